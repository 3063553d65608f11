"""Forked workers of which those that are left after a loss tell what was recorded, as Ray's do."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import cloudpickle
from forked_group import ForkedGroup

from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.driver.workers.worker_group import Recorded
from raytrainer.plan.common_moment import common_moment
from raytrainer.plan.recoveries import Continuity
from raytrainer.worker.step_records import RecordedMoments


class MendingGroup(ForkedGroup):
    """Other workers take over from a group that has lost some, whose others live until they have told."""

    before: ForkedGroup | None = None
    supply: MendingSupply

    def mended(self) -> Any:
        self.broken = True
        group = self.supply.make()
        group.before, group.continuity = self, Continuity(self.size - 1, 0)
        return group

    def recorded(self, chunks: Collection[int]) -> Recorded | None:
        before, self.before = self.before, None
        if before is None:
            return None
        told: dict[int, RecordedMoments] = {}
        for rank, pipe in enumerate(before._pipes):
            with contextlib.suppress(EOFError, OSError):
                pipe.send_bytes(cloudpickle.dumps(("moments", cloudpickle.dumps(None))))
                answer: Any = None
                while not isinstance(answer, RecordedMoments) and answer != "none":  # first what it was at
                    if not pipe.poll(self.supply.patience):
                        break  # as where Ray's do not come back: it waits for the lost one alone
                    answer = cloudpickle.loads(pipe.recv_bytes())
                if isinstance(answer, RecordedMoments):
                    told[rank] = answer
        found = None
        if told:
            chosen = common_moment(
                next(iter(told.values())).written, {rank: one.copied for rank, one in told.items()}, chunks
            )
            self.supply.chosen.append(chosen)
            if chosen is not None:
                pipe = before._pipes[chosen[1]]
                pipe.send_bytes(cloudpickle.dumps(("recorded", cloudpickle.dumps(chosen[0]))))
                found = Recorded(chosen[0][0], *cloudpickle.loads(pipe.recv_bytes()))
        before.abort()
        return found


class MendingSupply:
    """Gives such groups to trainers.

    Attributes:
        chosen: What each recovery has chosen.
        patience: Seconds for a worker to come out of what it was at.
    """

    def __init__(self, monkeypatch: Any) -> None:
        self.groups: list[MendingGroup] = []
        self.patience = 30.0
        self.chosen: list[Any] = []
        monkeypatch.setattr(GroupSupply, "prepare", lambda supply, settings: None)
        monkeypatch.setattr(GroupSupply, "take", lambda supply, settings, sizes=(): self.make())
        monkeypatch.setattr(GroupSupply, "give_back", lambda supply, group: self.end())

    def end(self) -> None:
        """The run is over, for groups too whose records nobody has asked for."""
        for group in self.groups:
            if any(process.is_alive() for process in group._processes):
                group.abort()

    def make(self) -> MendingGroup:
        group = MendingGroup(2)
        group.supply = self
        self.groups.append(group)
        return group
