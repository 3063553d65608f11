"""`MetricBoard`: metrics of all workers become the driver's, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from raytrainer.errors import MetricError
from raytrainer.metric_messages import MetricReport, MetricSpec, Number, Reduced
from raytrainer.metrics.exact_numbers import as_tensor, exact
from raytrainer.metrics.reductions import reduce_partials, reduce_steps
from raytrainer.plan.folding import by_text, ranks_text

__all__ = ["MetricBoard", "MetricTime", "Updates"]

Rows = list[tuple[int, int, dict[str, Number]]]

#: How often each worker's metric objects have been updated.
Updates = dict[MetricSpec, tuple[Number, ...]]


@dataclass(frozen=True)
class MetricTime:
    """When a metric got its value.

    Attributes:
        stage: What logged it: "train", "validate" or "test".
        batch: Training batches that each worker had done in the run by then.
    """

    stage: str
    batch: int


class MetricBoard:
    """What users see as `callback_metrics`, `logged_metrics` and `progress_bar_metrics`.

    Epoch values are reduced over all workers here, by name, weighted by batch size: workers run no collective for it,
    so workers that logged different names cannot wait for each other.

    Attributes:
        times: When each callback metric got its value. Whoever acts on one looks whether it is new.
        now: The time of what is taken up next.
        news: What workers have not been told yet; None: nothing.
    """

    def __init__(self) -> None:
        self.callback: dict[str, Tensor] = {}
        self.logged: dict[str, Tensor] = {}
        self.progress: dict[str, Number] = {}
        self.times: dict[str, MetricTime] = {}
        self.now = MetricTime("train", 0)
        self.news: Reduced | None = None

    def step_values(self, reports: Sequence[MetricReport]) -> Rows:
        """Take up step values; return rows (step, epoch, values) for the loggers.

        Those of evaluations are no callback metrics, as each is one batch's.
        """
        specs, training = reports[0].specs, self.now.stage == "train"
        by_step_name = {spec.step_name: spec for spec in specs.values()}
        rows: Rows = []
        shared = bool(reports[0].rows) and any(spec.sync_dist for spec in by_step_name.values())
        others = [{row.step: row.values for row in report.rows} for report in reports[1:]] if shared else []
        for row in reports[0].rows:
            merged = {}
            theirs = [by_step[row.step] for by_step in others if row.step in by_step]
            for name, value in row.values.items():
                if (spec := by_step_name.get(name)) is None:
                    raise MetricError(f"rank 0 has reported a value of {name!r}, and not how it is logged.")
                values = [value, *(other[name] for other in theirs if name in other)] if spec.sync_dist else [value]
                merged[name] = reduce_steps(spec, values, reports[0].fx.get(spec.name))
            rows.append((row.step, row.epoch, merged))
        rows = _with_samples(rows, reports)
        for _, _, merged in rows:
            self.logged.update({name: as_tensor(value) for name, value in merged.items()})
        for name, spec in specs.items():  # the latest, whether or not a row has them
            if not spec.on_step:
                continue
            values = [report.step[name] for report in _heard(reports, spec) if name in report.step]
            if not values:
                continue
            value = reduce_steps(spec, values, reports[0].fx.get(name))
            if training:
                self._show(spec, spec.step_name, value)
            if spec.prog_bar:
                self.progress[spec.step_name] = value
            if spec.logger:
                self.logged[spec.step_name] = as_tensor(value)
        return rows

    def epoch_values(
        self,
        reports: Sequence[MetricReport],
        what: str,
        batches: Sequence[Sequence[int]] | None = None,
        compute: Callable[[Updates], dict[str, float]] | None = None,
    ) -> Reduced:
        """Take up the epoch's values, reduced over workers; return them.

        Workers without a batch of a loader (`batches`, by worker and loader) need not have logged what others did.
        `compute` gives the values of metric objects, for which it may ask the workers: names agree by then. Without it
        these are left out.

        Raises:
            MetricError: Workers that had batches logged different names; says which worker lacks which.
        """
        names = reports[0].epoch.keys()
        alike = all(report.epoch.keys() == names for report in reports)  # as nearly always, of up to thousands
        if not alike:
            _check_names(reports, what, batches)
        specs: dict[str, MetricSpec] = {}
        for report in reports[:1] if alike else reports:
            for name in report.epoch:
                specs.setdefault(name, report.specs[name])
        objects = {
            spec: tuple(report.epoch[name].weight if name in report.epoch else 0 for report in reports)
            for name, spec in specs.items()
            if spec.metric is not None
        }
        computed = compute(objects) if objects and compute is not None else {}
        reduced = Reduced()
        for name, spec in specs.items():
            if spec.metric is not None and name not in computed:
                continue
            partials = [r.epoch[name] for r in reports if name in r.epoch]
            value = computed[name] if name in computed else reduce_partials(spec.reduce, partials)
            shown = self._show(spec, spec.epoch_name, value)
            reduced.callback[spec.name] = reduced.callback[spec.epoch_name] = value
            if spec.prog_bar:
                self.progress[spec.epoch_name] = reduced.progress[spec.epoch_name] = value
            if spec.logger:
                self.logged[spec.epoch_name] = shown
                reduced.logged[spec.epoch_name] = value
            loaders = {loader for partial in partials for loader in partial.loaders}
            if spec.loader is not None or loaders:
                reduced.loaders[spec.epoch_name] = [spec.loader] if spec.loader is not None else sorted(loaders)
        return reduced

    def tell(self, reduced: Reduced) -> None:
        """Have workers be told of these."""
        self.news = self.news or Reduced()
        self.news.add(reduced)

    def take_news(self) -> Reduced | None:
        """What workers have not been told yet; they are told by the caller."""
        news, self.news = self.news, None
        return news

    def _show(self, spec: MetricSpec, full_name: str, value: Number) -> Tensor:
        tensor = as_tensor(value)
        for name in (spec.name, full_name):
            self.callback[name], self.times[name] = tensor, self.now
        return tensor

    # ---------------------------------------------------------------- in checkpoints

    def plain(self) -> dict[str, Number]:
        """All callback metrics as numbers."""
        return {name: exact(value.item()) for name, value in self.callback.items()}

    def state(self) -> dict[str, Any]:
        """What `restore` needs beyond `plain`, as plain values."""
        return {
            "logged": {name: exact(value.item()) for name, value in self.logged.items()},
            "progress": dict(self.progress),
            "times": {name: [time.stage, time.batch] for name, time in self.times.items()},
        }

    def restore(self, values: dict[str, Number], state: dict[str, Any] | None = None) -> None:
        """Go on from the metrics of a checkpoint, and forget others."""
        state = state or {}
        kept = Reduced(dict(values), state.get("logged", {}), state.get("progress", {}))
        self.callback = {name: as_tensor(value) for name, value in kept.callback.items()}
        self.logged = {name: as_tensor(value) for name, value in kept.logged.items()}
        self.progress = dict(kept.progress)
        self.times = {name: MetricTime(*time) for name, time in state.get("times", {}).items()}
        self.news = kept


def _heard(reports: Sequence[MetricReport], spec: MetricSpec) -> Sequence[MetricReport]:
    """Reports that have a say in a step value: all, or the first that has it, where it is not to be reduced."""
    if spec.sync_dist:
        return reports
    return next(([report] for report in reports if spec.name in report.step), [])


_SAMPLED: dict[str, Callable[[list[Number]], Number]] = {"min": min, "max": max, "sum": sum, "mean": fmean}


def _with_samples(rows: Rows, reports: Sequence[MetricReport]) -> Rows:
    """The rows with what each worker has measured of itself.

    Of names that end in "/min", "/max", "/sum" or "/mean", workers' values become one; others are one worker's alone.
    """
    by_step = {step: (epoch, dict(values)) for step, epoch, values in rows}
    own: dict[int, dict[str, list[Number]]] = {}
    for row in (row for report in reports for row in report.samples):
        by_step.setdefault(row.step, (row.epoch, {}))
        for name, value in row.values.items():
            own.setdefault(row.step, {}).setdefault(name, []).append(value)
    for step, named in own.items():
        for name, values in named.items():
            by_step[step][1][name] = _SAMPLED.get(name.rpartition("/")[2], max)(values)
    return [(step, *by_step[step]) for step in sorted(by_step)] if own else rows


def _check_names(reports: Sequence[MetricReport], what: str, batches: Sequence[Sequence[int]] | None = None) -> None:
    """Every worker must have logged the same names, but for those of rank 0 alone and of loaders it had no batch of."""
    specs = {n: report.specs[n] for report in reports for n in report.epoch if not report.specs[n].rank_zero_only}
    lacking: dict[int, str] = {}
    in_order = sorted(specs.items())
    for rank, report in enumerate(reports):
        own = batches[rank] if batches is not None else [int(not report.idle)]
        missing = [
            repr(name)
            for name, spec in in_order
            if name not in report.epoch and any(own) and (spec.loader is None or own[spec.loader])
        ]
        if missing:
            lacking[rank] = ", ".join(missing)
    if lacking:
        details = [
            f"rank{'s' if len(ranks) > 1 else ''} {ranks_text(ranks)} did not log {names}"
            for ranks, names in by_text(lacking)
        ]
        raise MetricError(
            f"workers logged different names in {what}: {'; '.join(details)}. Log the same names on every rank, or "
            f"pass rank_zero_only=True for those that only rank 0 has."
        )
