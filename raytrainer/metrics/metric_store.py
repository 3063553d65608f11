"""What `self.log` does in a worker: keep values on the device, fetch them together, once a chunk.

A call costs a dictionary lookup and a detached copy, or the number itself where reading it waits for nothing (on
CPUs). Nothing is reduced, moved or synchronised before `report`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from raytrainer.errors import MetricError
from raytrainer.metric_messages import LogCall, MetricReport, MetricSpec, Reduced, StepRow
from raytrainer.metrics.batch_weight import BatchWeight
from raytrainer.metrics.device_fetch import begin_fetch
from raytrainer.metrics.exact_numbers import exact, number, plain, scalar
from raytrainer.metrics.metric_objects import is_metric, path_of, step_value
from raytrainer.metrics.metric_slots import Ledger, LogOptions, Slot, refuse_other_options, refuse_shared, spec_for
from raytrainer.metrics.shown_metrics import ShownMetrics

__all__ = ["MetricStore"]


class MetricStore:
    """Collects what one worker logs."""

    def __init__(self, rank: int, log_every_n_steps: int, root: nn.Module | None = None) -> None:
        self.root = root if root is not None else nn.Module()  # the module in which metric objects are found
        self.rank, self.every = rank, log_every_n_steps
        self.hook: str | None = None  # the hook that runs; None where logging is not allowed
        self._weight = BatchWeight(tells=rank == 0)
        self._whole_node = False
        self.moment = 0  # counts batches, and chunks
        self.in_batches = False  # whether hooks see step values, or the epoch's
        self._shown = ShownMetrics()
        self.loader_idx: int | None = None  # set where there are several evaluation loaders
        self.calls: Callable[[], list[LogCall]] = list  # what `self.logger` was asked to do since the last report
        self.twin = False  # whether another worker logs the very same, which counts
        self.first_of_node = True  # among workers that see the same batch of a node: the one whose values count
        self._samples: list[StepRow] = []
        self._begun: list[Callable[[], MetricReport]] = []  # what is being fetched, in order
        # a point in the device's work, as a function that waits for it
        self.mark: Callable[[], Callable[[], None]] = lambda: lambda: None
        self._ledgers = {"train": Ledger(), "evaluate": Ledger()}
        self._current = self._ledgers["train"]
        self.switch("train")

    def switch(self, ledger: str) -> None:
        """Log to the "train" or the "evaluate" ledger, so that a validation leaves the epoch's sums alone."""
        if self._ledgers[ledger] is not self._current:
            self.show()
            self._begun.clear()  # of an evaluation that has failed
        self._current = self._ledgers[ledger]
        self._slots, self._rows = self._current.slots, self._current.rows
        self.loader_idx = None

    def show(self) -> ShownMetrics:
        """What module code may see of the metrics here and now."""
        ledger = self._current
        if self.in_batches:
            self._shown.take_epoch(ledger, range(self.loader_idx or 0))
            self._shown.take_steps(ledger, self.loader_idx, ledger is self._ledgers["train"])
        else:
            self._shown.take_epoch(ledger)
        return self._shown

    def take(self, reduced: Reduced | None) -> None:
        """Values over all workers, from the driver, if it has some."""
        if reduced is not None:
            self._shown.take(reduced)

    def leave_batches(self, reduced: Reduced | None) -> None:
        """The batches of an epoch or evaluation are over: see `take_epoch`."""
        if self.in_batches:
            self._shown.take_steps(self._current, self.loader_idx, self._current is self._ledgers["train"])
        self.in_batches, self.loader_idx = False, None
        self.take_epoch(reduced)

    def take_epoch(self, reduced: Reduced | None) -> None:
        """From now on hooks see these values of the epoch or evaluation; of names not among them, the worker's own."""
        self.take(reduced)
        for slot in self._slots.values():
            slot.reduced = reduced is not None and slot.spec.name in reduced.callback

    def forget_batch(self) -> None:
        """Forget what the batch in progress has logged, since it has failed and will be repeated."""
        for slot in self._slots.values():
            if slot.moment == self.moment:
                kept = len(slot.pending) - slot.recent
                slot.last, slot.pending, slot.weight = None, slot.pending[:kept], slot.weight[:kept]

    def clear(self, shown: bool = False) -> None:
        """Forget what the current ledger holds; also all that has been `shown` of metrics."""
        if shown:
            self._shown.clear()
        self._current.clear()

    def close(self) -> None:
        """The run is over; epochs that have not ended leave nothing in the module's metrics."""
        for ledger in self._ledgers.values():
            ledger.reset_metrics()

    @property
    def batch(self) -> Any:
        """The batch that runs; None between batches."""
        return self._weight.batch

    def begin_batch(self, batch: Any) -> None:
        self._weight.begin(batch)
        self.moment += 1

    @contextmanager
    def whole_node(self, samples: int) -> Iterator[None]:
        """Inside, all workers of a node log the same values, of its whole batch: they count once, with that weight."""
        self._whole_node = True
        try:
            with self._weight.whole_node(samples):
                yield
        finally:
            self._whole_node = False

    def _is_first(self, spec: MetricSpec) -> bool:
        return not self.twin and (self.first_of_node or not spec.once_per_node)

    def counts(self, spec: MetricSpec) -> bool:
        """Whether this worker's values of the epoch are wanted."""
        return self._is_first(spec) and (self.rank == 0 or not spec.rank_zero_only)

    def log(
        self, name: str, value: Any, options: LogOptions, batch_size: int | None = None, sync_dist_group: Any = None
    ) -> None:
        """See `Module.log`."""
        add_dataloader_idx, rank_zero_only = options[-2:]
        # without the loader in its name, a metric is one over all loaders
        loader = self.loader_idx if add_dataloader_idx else None
        slot = self._slots.get((self.hook, name, loader))
        if slot is None or slot.options is None:
            slot = self._new_slot(name, options, sync_dist_group)
        if self.loader_idx is not None and loader is None:
            slot.loaders.add(self.loader_idx)
        if slot.options != options:
            refuse_other_options(slot, options, self.hook, name)
        if type(value) is Tensor and value.is_cpu and not value.ndim and not value.is_complex():
            slot.dtype, value = value.dtype, value.item()
        elif isinstance(value, Tensor):
            # a copy, since the caller may go on to change the tensor in place
            value = (value if type(value) is Tensor else plain(name, value)).detach().clone()
            if value.ndim or value.is_complex():
                value = scalar(name, value)
        else:
            slot.dtype = None
            if not isinstance(value, (int, float)):
                if is_metric(value):
                    self._note_metric(slot, name, value)
                    return
                value = number(name, value)
        spec = slot.spec
        if rank_zero_only and self.rank != 0:
            return
        if slot.moment != self.moment:
            slot.moment, slot.recent = self.moment, 0
        if spec.on_step:
            slot.last = value
        if spec.on_epoch:
            if type(batch_size) is not int or batch_size < 0:
                batch_size = self._weight.samples(name, self.hook, spec.reduce == "mean", batch_size)
            slot.pending.append(value)
            slot.weight.append(batch_size)
            slot.recent += 1

    def _note_metric(self, slot: Slot, name: str, metric: Any) -> None:
        """A torchmetrics object: its step value is what it has returned last; its epoch value is asked of it later."""
        if slot.metric is None:
            refuse_shared(self._ledgers, self._current, self.hook, name, metric)
            path = path_of(metric, self.root, name)
            slot.spec, slot.metric = replace(slot.spec, metric=path), metric
        elif slot.metric is not metric:
            raise MetricError(f"self.log({name!r}, ...) was called in {self.hook} with another metric object before.")
        slot.logged = True
        if slot.spec.on_step and (self.rank == 0 or not slot.spec.rank_zero_only):
            value = step_value(metric, name)
            slot.last = scalar(name, value.detach().clone()) if isinstance(value, Tensor) else float(value)
            slot.moment = self.moment

    def _new_slot(self, name: str, options: LogOptions, sync_dist_group: Any) -> Slot:
        if sync_dist_group is not None:
            raise MetricError(f"self.log({name!r}, ..., sync_dist_group=...): metrics are reduced over all workers.")
        loader = self.loader_idx if options[-2] else None
        spec = spec_for(name, options, self.hook, loader, once_per_node=self._whole_node)
        slot = Slot(spec, options, options[4] if spec.reduce == "custom" else None)
        restored = self._slots.get((self.hook, name, loader))
        if restored is not None:
            slot.folded, slot.custom = restored.folded, restored.custom
        self._slots[self.hook, name, loader] = slot
        return slot

    def note_row(self, step: int, epoch: int, since: int | None = None) -> None:
        """Keep the latest values logged after the moment `since` [in this batch] as a row for the loggers."""
        row = self._current.row(self.moment - 1 if since is None else since, self._tells_steps)
        if row:
            self._rows.append((step, epoch, row))

    def _tells_steps(self, spec: MetricSpec) -> bool:
        """Whether this worker's step values are wanted."""
        return self.rank == 0 or (spec.sync_dist and self._is_first(spec))

    def note_samples(self, step: int, epoch: int, samplers: Sequence[Callable[[], dict[str, float]]]) -> None:
        """Keep what is measured of this worker right now, if anything is, as a row for the loggers."""
        if samplers:
            values = {name: value for sampler in samplers for name, value in sampler().items()}
            self._samples.append(StepRow(step, epoch, values))

    def is_log_step(self, step: int) -> bool:
        """Whether the 0-based `step` is one whose values the loggers are given."""
        return self.every > 0 and (step + 1) % self.every == 0

    def report(self, end_of_epoch: bool = False) -> MetricReport:
        """Everything since the last report, fetched from the device in one go."""
        self.begin_report()
        report = self.finish_report()
        if end_of_epoch:
            self.add_epoch(report)
            self.begin_epoch()
        return report

    def finish_report(self, left: int = 0) -> MetricReport:
        """Wait for what `begin_report` has had fetched, and give it; but for what the last `left` calls have."""
        report = MetricReport()
        while len(self._begun) > left:
            report.add(self._begun.pop(0)())
        return report

    def give_back(self, report: MetricReport) -> None:
        """Have the next report begin with what this one has, which has gone nowhere."""
        self._begun.append(lambda: report)

    def begin_report(self) -> None:
        """Have everything since the last report fetched. What is logged from now on is left for the next one."""
        rows, samples, calls = self._rows.copy(), self._samples, self.calls()
        self._rows.clear()
        self._samples = []
        values = [value for _, _, row in rows for _, value in row]
        taken: list[tuple[Slot, bool, list[int]]] = []
        for slot in self._slots.values():
            taken.append((slot, slot.last is not None, slot.weight))
            if slot.last is not None:
                values.append(slot.last)
                slot.shown = slot.last
            values += slot.pending
            slot.last, slot.pending, slot.weight = None, [], []
        fetched, wait = begin_fetch(values), self.mark()

        def taken_up() -> MetricReport:
            wait()  # also where nothing is logged: else what a chunk takes would be unknown
            numbers = iter(fetched())
            report = MetricReport(samples=samples, calls=calls)
            for step, epoch, row in rows:
                report.rows.append(StepRow(step, epoch, {s.spec.step_name: exact(next(numbers)) for s, _ in row}))
                report.specs.update({slot.spec.name: slot.spec for slot, _ in row})
            for slot, has_last, weights in taken:
                if has_last:
                    last = next(numbers)
                    report.specs[slot.spec.name] = slot.spec
                    if self._tells_steps(slot.spec):
                        report.step[slot.spec.name] = exact(last)
                        if slot.fx is not None and slot.spec.sync_dist:
                            report.fx[slot.spec.name] = slot.fx
                if weights:
                    slot.fold([next(numbers) for _ in weights], weights)
            return report

        self._begun.append(taken_up)

    def add_epoch(self, report: MetricReport) -> None:
        """Add this worker's shares of the epoch's values so far; call after `report`."""
        for slot in self._slots.values():
            share = slot.share(self._is_first(slot.spec)) if slot.spec.on_epoch else None
            if share is not None:
                report.specs[slot.spec.name], report.epoch[slot.spec.name] = slot.spec, share

    def begin_epoch(self) -> None:
        """The epoch's values begin anew."""
        for slot in self._slots.values():
            slot.begin_epoch()

    def reset_objects(self) -> None:
        """Metric objects that the current ledger knows begin anew."""
        self._current.reset_metrics()

    def take_sums(self, saved: list[dict[str, Any]]) -> None:
        """Go on from sums that `sums` gave."""
        self._current.take_sums(saved, self.root)

    def sums(self) -> list[dict[str, Any]]:
        """The training epoch's sums so far as plain values, for a checkpoint; call after `report`."""
        return self._ledgers["train"].sums()
