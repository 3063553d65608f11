"""`MetricBoard`: metrics of all workers become the driver's, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor

from raytrainer.errors import MetricError
from raytrainer.messages import MetricReport, MetricSpec, Partial

__all__ = ["MetricBoard", "reduce_partials"]


class MetricBoard:
    """What users see as `callback_metrics`, `logged_metrics` and `progress_bar_metrics`.

    Epoch values are reduced over all workers here, by name, weighted by batch size: workers run no collective for it,
    so workers that logged different names cannot wait for each other.
    """

    def __init__(self) -> None:
        self.callback: dict[str, Tensor] = {}
        self.logged: dict[str, Tensor] = {}
        self.progress: dict[str, float] = {}

    def step_values(self, reports: Sequence[MetricReport]) -> list[tuple[int, int, dict[str, float]]]:
        """Take up step values; return rows (step, epoch, values) for the loggers."""
        for name, spec in reports[0].specs.items():
            values = [report.step[name] for report in reports if name in report.step]
            if not spec.on_step or not values:
                continue
            value = _synced(spec, values)
            self._show(spec, spec.step_name, value)
        rows: list[tuple[int, int, dict[str, float]]] = []
        others = [{row.step: row.values for row in report.rows} for report in reports[1:]]
        for row in reports[0].rows:
            merged = dict(row.values)
            for name in merged:
                values = [merged[name], *(r[row.step][name] for r in others if name in r.get(row.step, {}))]
                merged[name] = sum(values) / len(values)
            rows.append((row.step, row.epoch, merged))
        rows = _with_samples(rows, reports)
        for _, _, merged in rows:
            self.logged.update({name: torch.tensor(value) for name, value in merged.items()})
        return rows

    def epoch_values(
        self,
        reports: Sequence[MetricReport],
        what: str,
        batches: Sequence[Sequence[int]] | None = None,
        compute: Callable[[list[MetricSpec]], dict[str, float]] = lambda specs: {},
    ) -> dict[str, float]:
        """Take up the epoch's values, reduced over workers; return those for the loggers.

        Workers without a batch of a loader (`batches`, by worker and loader) need not have logged what others did.
        `compute` asks the workers for the values of metric objects, which all have by then: names agree.

        Raises:
            MetricError: Workers that had batches logged different names; says which worker lacks which.
        """
        _check_names(reports, what, batches)
        specs: dict[str, MetricSpec] = {}
        for report in reports:
            for name in report.epoch:
                specs.setdefault(name, report.specs[name])
        objects = [spec for spec in specs.values() if spec.metric is not None]
        computed = compute(objects) if objects else {}
        to_log = {}
        for name, spec in specs.items():
            partials = [r.epoch[name] for r in reports if name in r.epoch]
            value = computed[name] if name in computed else reduce_partials(spec.reduce, partials)
            self._show(spec, spec.epoch_name, value)
            if spec.logger:
                to_log[spec.epoch_name] = value
                self.logged[spec.epoch_name] = torch.tensor(value)
        return to_log

    def _show(self, spec: MetricSpec, full_name: str, value: float) -> None:
        tensor = torch.tensor(value)
        self.callback[spec.name] = tensor
        self.callback[full_name] = tensor
        if spec.prog_bar:
            self.progress[full_name] = value

    def restore(self, values: dict[str, float]) -> None:
        """Go on from the metrics of a checkpoint."""
        self.callback.update({name: torch.tensor(value) for name, value in values.items()})

    def plain(self) -> dict[str, float]:
        """All metrics as numbers."""
        return {name: value.item() for name, value in self.callback.items()}


_SAMPLED: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max, "sum": sum, "mean": fmean}


def _with_samples(
    rows: list[tuple[int, int, dict[str, float]]], reports: Sequence[MetricReport]
) -> list[tuple[int, int, dict[str, float]]]:
    """The rows with what each worker has measured of itself.

    Of names that end in "/min", "/max", "/sum" or "/mean", workers' values become one; others are one worker's alone.
    """
    by_step = {step: (epoch, dict(values)) for step, epoch, values in rows}
    own: dict[int, dict[str, list[float]]] = {}
    for row in (row for report in reports for row in report.samples):
        by_step.setdefault(row.step, (row.epoch, {}))
        for name, value in row.values.items():
            own.setdefault(row.step, {}).setdefault(name, []).append(value)
    for step, named in own.items():
        for name, values in named.items():
            by_step[step][1][name] = _SAMPLED.get(name.rpartition("/")[2], max)(values)
    return [(step, *by_step[step]) for step in sorted(by_step)] if own else rows


def _synced(spec: MetricSpec, values: Sequence[float]) -> float:
    if not spec.sync_dist or len(values) == 1:
        return values[0]
    if spec.reduce == "sum":
        return sum(values)
    if spec.reduce in ("min", "max"):
        return (min if spec.reduce == "min" else max)(values)
    return sum(values) / len(values)


def reduce_partials(reduce: str, partials: Sequence[Partial]) -> float:
    """One value from all workers' shares: means are weighted by the number of samples."""
    if reduce == "custom":
        values = torch.tensor([value for partial in partials for value in partial.values])
        return float(partials[0].fx(values))
    totals = [partial.total for partial in partials]
    if reduce == "sum":
        return sum(totals)
    if reduce in ("min", "max"):
        return (min if reduce == "min" else max)(totals)
    weight = sum(partial.weight for partial in partials)
    return sum(totals) / weight if weight else float("nan")


def _check_names(reports: Sequence[MetricReport], what: str, batches: Sequence[Sequence[int]] | None = None) -> None:
    """Every worker must have logged the same names, but for those of rank 0 alone and of loaders it had no batch of."""
    specs = {n: report.specs[n] for report in reports for n in report.epoch if not report.specs[n].rank_zero_only}
    details = []
    for rank, report in enumerate(reports):
        own = batches[rank] if batches is not None else [int(not report.idle)]
        missing = [
            repr(name)
            for name, spec in sorted(specs.items())
            if name not in report.epoch and any(own) and (spec.loader is None or own[spec.loader])
        ]
        if missing:
            details.append(f"rank {rank} did not log {', '.join(missing)}")
    if details:
        raise MetricError(
            f"workers logged different names in {what}: {'; '.join(details)}. Log the same names on every rank, or "
            f"pass rank_zero_only=True for those that only rank 0 has."
        )
