"""`StagingWorker`: a worker's actor whose states are copied aside, and then made safe beside training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import ray

from raytrainer.quick_imports import importing

with importing(alone=True):  # as in actor.py; torch comes with the first of them
    from raytrainer.checkpointing.pieces import KEY
    from raytrainer.errors import RaytrainerError
    from raytrainer.memory_segments import Handed, Segment, has_room, new_segment
    from raytrainer.plan.ranks import Ranks
    from raytrainer.private.torch_private import abort_groups
    from raytrainer.tensor_packing import pack
    from raytrainer.worker.actor.actor import Failure, RemoteWorker, refuse_unpicklable
    from raytrainer.worker.actor.module_pickling import Pickled
    from raytrainer.worker.actor.pieces_apart import apart
    from raytrainer.worker.shared_staging import SharedStaging
    from raytrainer.worker.staging import Staged, arrived

__all__ = ["ASIDE", "StagingWorker"]

#: Ray's name for the thread in which a worker's actor hands over what it has staged.
ASIDE = "aside"


class StagingWorker(RemoteWorker):
    """One that copies its state out of a GPU, which training waits for; all else a thread does beside training.

    Shards are copied to where they outlive this process, once `share_memory` has been called. All else is copied twice:
    to buffers of this process, and from there by Ray.

    With such a thread, Ray runs all other methods outside of the process's main one.
    """

    staged: Any = None
    shared: SharedStaging | None = None
    sample: tuple[int, Segment] | None = None

    def _join(self, ranks: Ranks, host: str, port: int, own_address: str, on_gpu: bool) -> None:
        super()._join(ranks, host, port, own_address, on_gpu)
        self._worker().staging.shared = self.shared  # what it has of the group before

    def load(self, pickled: Pickled, datasets: dict[str, Any], show: bool) -> Failure | str | None:
        """See `RemoteWorker.load`. What an earlier run has staged, and nobody has asked for, goes."""
        self.staged = None
        return super().load(pickled, datasets, show)

    def _rest(self) -> Any:
        self._end_sharing()
        return super()._rest()

    @ray.method(concurrency_group=ASIDE)
    def share_memory(self, kept: Mapping[int, Handed], former: Collection[int] = ()) -> Any:
        """From now on, keep shards in memory that other processes of this machine can open.

        Args:
            kept: What there is of the place in the group that this worker has. Empty: it is to begin anew.
            former: See `SharedStaging.adopt`.

        Returns:
            A sample of such memory. None: the system has none.
        """

        def share_memory() -> Segment | None:
            if not kept:
                self._end_sharing()
            if self.shared is None:
                self.shared = SharedStaging(self.device)
            self._worker().staging.shared = self.shared
            self.shared.adopt(kept, former)
            try:
                self.sample = self.sample or new_segment(1)
            except OSError:
                return None
            return self.sample[1]

        return self._guard(share_memory)

    def unshare_memory(self) -> None:
        """The reverse of `share_memory`."""
        self._end_sharing()

    def _end_sharing(self) -> None:
        if self.shared is not None:
            self.shared.close()
        self.shared = None
        if self.worker is not None:
            self.worker.staging.shared = None

    @ray.method(concurrency_group=ASIDE)
    def reserve_like(self, slot: int, other: int, *handed: Any) -> None:
        """See `SharedStaging`; if all workers have found room, of which what they have handed over tells."""
        shared = self.shared
        if shared is not None and all(isinstance(each, Handed) and each.room for each in handed):
            shared.reserve_like(slot, other)

    def stage(self, weights_only: bool, final: bool = False, slot: int | None = None) -> Any:
        """Copy this worker's share of a checkpoint aside; return what it alone has. `hand_over` gives the rest.

        Args:
            weights_only: Leave out what only resuming needs.
            final: The fit is over.
            slot: Where shards go, if they are shared: nobody needs any more what was there.
        """

        def stage() -> Any:
            self.staged = None  # of a capture that another rank has failed
            if slot is not None and self.shared is None:
                raise RaytrainerError("this worker shares no memory; this is a bug in raytrainer")
            staged = self._worker().capture(weights_only, replica=True, final=final, slot=slot)
            assert isinstance(staged, Staged)
            refuse_unpicklable({name: value for name, value in staged.items() if name != KEY})
            self.staged = staged
            return pack(staged.get("own"))

        return self._guard(stage)

    # said here, since a call over ray:// cannot
    @ray.method(concurrency_group=ASIDE, num_returns=3)
    def hand_over(self) -> tuple[Any, Any, bool]:
        """The rest of what has been staged, as in `capture`; Ray copies it into shared memory as this returns.

        Of shards that are shared, it is where they are. Runs in the thread `ASIDE`, beside training. The last answer
        says whether it is there, and comes when the buffers may be used for the next `stage`.
        """
        staged, self.staged = self.staged, None
        answer = self._guard(lambda: apart(arrived(staged), self._with_room(staged.handed)))
        return (answer, answer, False) if isinstance(answer, Failure) else (*answer, True)

    def _with_room(self, handed: Handed | None) -> Handed | None:
        return handed and replace(handed, room=has_room(handed.segment.size * self.ranks.world_size))

    @ray.method(concurrency_group=ASIDE)
    def abort_groups(self) -> bool:
        """Free the main thread from what NCCL waits for. Nothing else is to be told to it until this has answered."""
        self.close_records()  # which count what the device has done
        return bool(self._guard(abort_groups) is True)
