"""Whether all workers have the same weights: asked at the end of epochs, and told when they have not."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Sequence
from typing import Any

from raytrainer.driver.workers.worker_group import WorkerGroup
from raytrainer.errors import DisagreementError
from raytrainer.messages import Difference, Fingerprints, TrainStart
from raytrainer.plan.folding import by_text, ranks_text
from raytrainer.worker.worker import Worker

__all__ = ["ReplicaCheck", "alike"]

log = logging.getLogger("raytrainer")

#: Time between two checks, in times of what one takes: they cost at most a thousandth of the run.
SELDOM = 1000.0

#: Settings of optimizers that differ by less, relatively or at all, are the same.
_ROUNDING, _NOTHING = 1e-5, 1e-14


def alike(starts: Sequence[TrainStart], epoch: int) -> Sequence[TrainStart]:
    """`starts` as given, once it is sure that all workers are about to train the same parameters.

    Raises:
        DisagreementError: They are not: each would wait for gradients that others never send.
    """
    if all(start.trained == starts[0].trained for start in starts):
        return starts
    told = by_text({rank: ", ".join(start.switched) or "nothing has changed" for rank, start in enumerate(starts)})
    where = "; ".join(f"on rank(s) [{ranks_text(ranks)}] {text}" for ranks, text in told)
    raise DisagreementError(
        f"epoch {epoch} begins with other parameters to train on some workers than on others: {where}. What hooks "
        f"freeze (requires_grad_), unfreeze, add or drop must be the same on all workers."
    )


class ReplicaCheck:
    """Compares checksums of what workers hold: an epoch's first check is due at once, later ones as time allows.

    Gradients are averaged in the backward pass. What changes weights or gradients after that, on one worker or on each
    in its own way, lets them drift apart without a word: rank 0's are then those that are saved, with the others'
    gradients for other weights.

    Buffers that workers change (running statistics) differ as they should: each normalises its own batches, and the
    next forward pass begins with rank 0's. One that rank 0 has left as it was, and another worker has not, is compared.

    Args:
        wanted: Whether to compare at all.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._due = 0.0  # when the next check may be
        self._pending = False  # an epoch has ended since the latest one
        self._buffers: dict[str, int] = {}  # of rank 0, at the latest check
        self._told = False  # of differences that are rounding

    def begin(self, group: WorkerGroup, goes_on: bool = False) -> None:
        """Training is about to begin; `goes_on`: from a state that has workers' own buffers, which may differ.

        An epoch may have nothing left but its end, so that these differ as they should though rank 0 changes none.
        """
        self._pending = False
        if self._active(group):
            reports: list[Fingerprints] = group.call(Worker.fingerprints, parameters=False)
            own = set(_differing(reports, set())) if goes_on else set[str]()
            self._buffers = {name: number for name, number in reports[0].buffers.items() if name not in own}

    def after_epoch(self, group: WorkerGroup, epoch: int) -> None:
        """An epoch has ended.

        Raises:
            DisagreementError: Workers have different weights.
        """
        self._pending = True
        if time.monotonic() >= self._due:
            self.check(group, epoch)

    def check(self, group: WorkerGroup, epoch: int) -> None:
        """Compare, unless this has been done since the latest epoch.

        Raises:
            DisagreementError: Workers have different weights.
        """
        if not self._pending or not self._active(group):
            return
        self._pending = False
        begun = time.monotonic()
        reports: list[Fingerprints] = group.call(Worker.fingerprints)
        changed = {name for name, number in reports[0].buffers.items() if self._buffers.get(name) != number}
        self._buffers = reports[0].buffers
        _refuse_single_ones(reports, epoch)
        _refuse_other_settings(reports, epoch)
        names = _differing(reports, changed)
        if names:
            pieces = {name for report in reports for name, piece in report.pieces.items() if piece}
            self._tell(names, group.call(Worker.compare, names[:100]), epoch, len(names), pieces)
        ended = time.monotonic()
        self._due = ended + SELDOM * (ended - begun)

    def _active(self, group: WorkerGroup) -> bool:
        return self._wanted and group.size > 1

    def _tell(
        self,
        names: Sequence[str],
        found: Sequence[Sequence[Difference]],
        epoch: int,
        count: int,
        pieces: Collection[str],
    ) -> None:
        """Raise, or warn where it is rounding."""
        serious = [
            (name, rank, difference)
            for place, name in enumerate(names[:100])
            for rank, differences in enumerate(found)
            if not (difference := differences[place]).largest <= difference.rounding * difference.scale
        ]
        if not serious:
            if not self._told:
                log.warning(
                    "After epoch %d, workers have weights that differ by rounding, first in %s: their machines compute "
                    "differently. This is harmless as long as it stays small.", epoch, names[0],
                )  # fmt: skip
            self._told = True
            return
        name, _, _ = serious[0]
        ranks = sorted({rank for other, rank, _ in serious if other == name})
        largest, scale = max((d.largest, d.scale) for other, _, d in serious if other == name)
        whom = "the first rank with that piece of it" if name in pieces else "rank 0"
        more = f", and {count - 1} more tensor{'s' if count > 2 else ''}" if count > 1 else ""
        raise DisagreementError(
            f"after epoch {epoch} rank(s) [{ranks_text(ranks)}] have another {name} than {whom}: it differs by up "
            f"to {largest:.3g}, and the largest element there is {scale:.3g}{more}. Gradients are averaged in the "
            f"backward pass; what changes weights or .grad later must do the same on all workers. Look for an "
            f"optimizer that writes .grad itself, in-place changes on one rank, or random numbers in them. With "
            f"check_replicas=False in the strategy's settings (rt.DDP, rt.FSDP) nobody looks."
        )


def _refuse_single_ones(reports: Sequence[Fingerprints], epoch: int) -> None:
    """Refuse parameters that only some workers have."""
    for name in dict.fromkeys(name for report in reports for name in report.parameters):
        ranks = [rank for rank, report in enumerate(reports) if name in report.parameters]
        if len(ranks) < len(reports):
            raise DisagreementError(
                f"after epoch {epoch} only rank(s) [{ranks_text(ranks)}] have a parameter {name}. What hooks and steps "
                f"add or drop must be the same on all workers."
            )


def _refuse_other_settings(reports: Sequence[Fingerprints], epoch: int) -> None:
    """Refuse optimizers that go by other numbers on some workers."""
    first = reports[0].settings
    for name in dict.fromkeys(name for report in reports for name in report.settings):
        ranks = [r for r, report in enumerate(reports) if not _same(report.settings.get(name), first.get(name))]
        if ranks:
            other = reports[ranks[0]].settings.get(name)
            raise DisagreementError(
                f"after epoch {epoch} rank(s) [{ranks_text(ranks)}] have another {name}: {other}, where rank 0 has "
                f"{first.get(name)}. What hooks and steps change in an optimizer must be the same on all workers."
            )


def _same(one: Any, other: Any) -> bool:
    """Machines may compute schedules that differ by rounding, in float32 too, or come to 1e-19 rather than 0."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        near = math.isclose(one, other, rel_tol=_ROUNDING, abs_tol=_NOTHING)
        return near or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def _differing(reports: Sequence[Fingerprints], changed: set[str]) -> list[str]:
    """Names of what is not the same everywhere, in the module's order."""
    first = reports[0]
    names = [name for name in first.parameters if not _alike(reports, name)]
    return names + [
        n
        for n, number in first.buffers.items()
        if n not in changed and any(r.buffers.get(n, number) != number for r in reports)
    ]


def _alike(reports: Sequence[Fingerprints], name: str) -> bool:
    """Whether all that have the same piece of a parameter hold the same."""
    seen: dict[str, int] = {}
    return all(
        seen.setdefault(each.pieces.get(name, ""), each.parameters[name]) == each.parameters[name] for each in reports
    )
