"""What all workers report as one: the slowest time, the fewest batches, predictions in order.

Not metrics, which `metrics/metric_board.py` reduces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raytrainer.data.slicing import join_parts
from raytrainer.errors import DisagreementError
from raytrainer.messages import TrainReport
from raytrainer.plan.folding import by_text, ranks_text

__all__ = ["in_order", "longest", "merged", "shortest"]


def merged(reports: Sequence[TrainReport]) -> TrainReport:
    """One report for all workers: the slowest time, any request to stop.

    Raises:
        DisagreementError: Workers have done different numbers of optimizer steps, or of validations.
    """
    if len(reports) == 1:
        return reports[0]
    if any(report.step != reports[0].step for report in reports):
        told = by_text({rank: f"{report.step}" for rank, report in enumerate(reports)})
        raise DisagreementError(
            f"workers have done different numbers of optimizer steps by batch {reports[0].batch} of the epoch: "
            f"{'; '.join(f'rank(s) {ranks_text(ranks)}: {what}' for ranks, what in told)}. With manual optimization, "
            f"all must call optimizer.step() in the same batches."
        )
    if len({report.validation is None for report in reports}) > 1:
        raise DisagreementError("some workers have gone on to a validation and others not; this is a bug in raytrainer")
    return replace(
        reports[0],
        seconds=max(r.seconds for r in reports),
        data_seconds=max(r.data_seconds for r in reports),
        exhausted=any(r.exhausted for r in reports),
        stop=any(r.stop for r in reports),
        behind=any(r.behind for r in reports),
    )


def in_order(predictions: Sequence[tuple[int, int, Any]]) -> list[tuple[int, int, Any]]:
    """(loader, batch, output) sorted, where workers that split a batch have each sent a part, in order of rank."""
    parts: dict[tuple[int, int], list[Any]] = {}
    for loader, batch, output in predictions:
        parts.setdefault((loader, batch), []).append(output)
    return [(*key, outputs[0] if len(outputs) == 1 else join_parts(outputs)) for key, outputs in sorted(parts.items())]


def shortest(lengths: Sequence[int | None]) -> int | None:
    """The batches that every worker has; None if some worker does not know."""
    known = [n for n in lengths if n is not None]
    return min(known) if len(known) == len(lengths) else None


def longest(by_worker: Sequence[list[int | None]]) -> list[int | None]:
    """For each loader, the batches of the worker that has most.

    Raises:
        DisagreementError: Workers have different numbers of loaders.
    """
    counts = [len(lengths) for lengths in by_worker]
    if len(set(counts)) > 1:
        told = by_text({rank: f"{count} loader{'' if count == 1 else 's'}" for rank, count in enumerate(counts)})
        raise DisagreementError(
            f"workers have different numbers of loaders to evaluate: "
            f"{'; '.join(f'rank(s) {ranks_text(ranks)}: {what}' for ranks, what in told)}. Return as many on each."
        )
    most: list[int | None] = []
    for lengths in zip(*by_worker, strict=True):
        known = [n for n in lengths if n is not None]
        most.append(max(known) if len(known) == len(lengths) else None)
    return most
