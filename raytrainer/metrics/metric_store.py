"""What `self.log` does in a worker: keep values on the device, fetch them together, once a chunk.

A call costs a dictionary lookup and a detached copy. Nothing is reduced, moved or synchronised before `report`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from raytrainer.data.transfer import first_batch_size
from raytrainer.errors import MetricError
from raytrainer.messages import LogCall, MetricReport, MetricSpec, Partial, StepRow
from raytrainer.metrics.metric_objects import is_metric, path_of, reset, step_value

__all__ = ["MetricStore"]

_STEP_HOOKS = frozenset(
    [
        "on_before_backward",
        "backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "optimizer_step",
        "configure_gradient_clipping",
        "on_before_zero_grad",
        "optimizer_zero_grad",
        "on_train_batch_start",
        "on_train_batch_end",
        "training_step",
        "training_step_end",
    ]
)
_BATCH_HOOKS = frozenset(
    [
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_test_batch_start",
        "on_test_batch_end",
        "validation_step",
        "validation_step_end",
        "test_step",
        "test_step_end",
    ]
)
_EPOCH_HOOKS = frozenset(
    [
        "on_train_start",
        "on_train_epoch_start",
        "on_train_epoch_end",
        "on_validation_start",
        "on_validation_epoch_start",
        "on_validation_epoch_end",
        "on_test_start",
        "on_test_epoch_start",
        "on_test_epoch_end",
    ]
)
_REDUCTIONS = {"mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max"}

#: What changes no reduced value.
_NEUTRAL = {"min": float("inf"), "max": float("-inf")}


class _Slot:
    """One name in one hook: how it is treated, its latest value, and the values of the epoch not yet fetched."""

    __slots__ = (
        "arguments",
        "custom",
        "folded",
        "fx",
        "kept",
        "last",
        "logged",
        "metric",
        "moment",
        "pending",
        "recent",
        "spec",
        "total",
        "weight",
    )

    def __init__(self, spec: MetricSpec, arguments: tuple[Any, ...] | None, fx: Any) -> None:
        self.spec, self.arguments, self.fx = spec, arguments, fx
        self.last: Any = None  # latest step value
        self.moment = -1  # batch in which it was logged
        self.pending: list[Any] = []  # values of this epoch, on the device
        self.recent = 0  # how many of these are of that batch
        self.weight: list[int] = []  # their batch sizes
        self.folded: list[float] = []  # [total, weight] of values fetched before
        self.metric: Any = None  # the torchmetrics object that is logged here
        self.logged = False  # it has been, in this epoch
        self.custom: list[float] = []  # all values fetched before, for a custom reduction


class _Ledger:
    """Slots by (hook, name, loader), and rows kept for the loggers: (step, epoch, [(name, value)])."""

    def __init__(self) -> None:
        self.slots: dict[tuple[str | None, str, int | None], _Slot] = {}
        self.rows: list[tuple[int, int, list[tuple[str, Any]]]] = []


class MetricStore:
    """Collects what one worker logs."""

    def __init__(self, rank: int, log_every_n_steps: int, root: nn.Module | None = None) -> None:
        self.rank = rank
        self.root = root if root is not None else nn.Module()  # the module in which metric objects are found
        self.every = log_every_n_steps
        self.hook: str | None = None  # the hook that runs; None where logging is not allowed
        self.batch: Any = None  # the batch that runs, for its size
        self.moment = 0  # counts batches
        self.loader_idx: int | None = None  # set where there are several evaluation loaders
        self.calls: Callable[[], list[LogCall]] = list  # what `self.logger` was asked to do since the last report
        self.first_of_node = True  # among workers that see the same batch of a node: the one whose values count
        self._whole: int | None = None  # samples in the node's batch, while a hook runs that sees all of it
        self._size: int | None = None
        self._samples: list[StepRow] = []
        self._begun: list[Callable[[], MetricReport]] = []  # what is being fetched, in order
        # a point in the device's work, as a function that waits for it
        self.mark: Callable[[], Callable[[], None]] = lambda: lambda: None
        self._ledgers = {"train": _Ledger(), "evaluate": _Ledger()}
        self._current = self._ledgers["train"]
        self.switch("train")

    def switch(self, ledger: str) -> None:
        """Log to the "train" or the "evaluate" ledger, so that a validation leaves the epoch's sums alone."""
        if self._ledgers[ledger] is not self._current:
            self._begun.clear()  # of an evaluation that has failed
        self._current = self._ledgers[ledger]
        self._slots, self._rows = self._current.slots, self._current.rows
        self.loader_idx = None

    def forget_batch(self) -> None:
        """Forget what the batch in progress has logged, since it has failed and will be repeated."""
        for slot in self._slots.values():
            if slot.moment == self.moment:
                kept = len(slot.pending) - slot.recent
                slot.last, slot.pending, slot.weight = None, slot.pending[:kept], slot.weight[:kept]

    def clear(self) -> None:
        """Forget what the current ledger holds."""
        self._reset_metrics(self._current)
        self._slots.clear()
        self._rows.clear()

    def close(self) -> None:
        """The run is over; epochs that have not ended leave nothing in the module's metrics."""
        for ledger in self._ledgers.values():
            self._reset_metrics(ledger)

    @staticmethod
    def _reset_metrics(ledger: _Ledger) -> None:
        for slot in ledger.slots.values():
            if slot.metric is not None:
                reset(slot.metric)

    def begin_batch(self, batch: Any) -> None:
        self.batch = batch
        self._size = None
        self.moment += 1

    @contextmanager
    def whole_node(self, samples: int) -> Iterator[None]:
        """Inside, all workers of a node log the same values, of its whole batch: they count once, with that weight."""
        self._whole = samples
        try:
            yield
        finally:
            self._whole = None

    def _counts(self, spec: MetricSpec) -> bool:
        return self.first_of_node or not spec.once_per_node

    def counts(self, spec: MetricSpec) -> bool:
        """Whether this worker's values of the epoch are wanted."""
        return self._counts(spec) and (self.rank == 0 or not spec.rank_zero_only)

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool,
        logger: bool | None,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: Any,
        sync_dist: bool,
        sync_dist_group: Any,
        add_dataloader_idx: bool,
        batch_size: int | None,
        rank_zero_only: bool,
    ) -> None:
        """See `Module.log`."""
        # without the loader in its name, a metric is one over all loaders
        loader = self.loader_idx if add_dataloader_idx else None
        slot = self._slots.get((self.hook, name, loader))
        arguments = (prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist, add_dataloader_idx, rank_zero_only)
        if slot is None or slot.arguments is None:
            slot = self._new_slot(name, arguments, sync_dist_group)
        elif slot.arguments != arguments:
            raise MetricError(
                f"self.log({name!r}, ...) was called in {self.hook} with other options than before; use the same "
                f"options, or another name."
            )
        if isinstance(value, Tensor):
            # a copy, since the caller may go on to change the tensor in place
            value = value.detach().clone()
            if value.ndim:
                value = self._scalar(name, value)
        elif not isinstance(value, (int, float)):
            if is_metric(value):
                self._note_metric(slot, name, value)
                return
            value = self._number(name, value)
        spec = slot.spec
        if rank_zero_only and self.rank != 0:
            return
        if slot.moment != self.moment:
            slot.moment, slot.recent = self.moment, 0
        if spec.on_step:
            slot.last = value
        if spec.on_epoch:
            if batch_size is None:
                batch_size = self._size if self._whole is None else self._whole
                if batch_size is None:
                    batch_size = self._size = first_batch_size(self.batch)
            slot.pending.append(value)
            slot.weight.append(batch_size)
            slot.recent += 1

    def _note_metric(self, slot: _Slot, name: str, metric: Any) -> None:
        """A torchmetrics object: its step value is what it has returned last; its epoch value is asked of it later."""
        if slot.metric is None:
            self._refuse_shared(name, metric)
            path = path_of(metric, self.root, name)
            slot.spec, slot.metric = replace(slot.spec, metric=path), metric
        elif slot.metric is not metric:
            raise MetricError(f"self.log({name!r}, ...) was called in {self.hook} with another metric object before.")
        slot.logged = True
        if slot.spec.on_step and (self.rank == 0 or not slot.spec.rank_zero_only):
            value = step_value(metric, name)
            slot.last = self._scalar(name, value.detach().clone()) if isinstance(value, Tensor) else float(value)
            slot.moment = self.moment

    def _refuse_shared(self, name: str, metric: Any) -> None:
        """Training and validation must not update one object: a validation within an epoch would take its batches."""
        for key, ledger in self._ledgers.items():
            if ledger is not self._current and any(slot.metric is metric for slot in ledger.slots.values()):
                there = "training" if key == "train" else "validation"
                raise MetricError(
                    f"self.log({name!r}, <{type(metric).__name__}>) in {self.hook}: {there} logs the same metric "
                    f"object, which would mix both; use one object a stage, as self.train_acc and self.val_acc."
                )

    def _scalar(self, name: str, value: Tensor) -> Tensor:
        if value.numel() != 1:
            raise MetricError(
                f"self.log({name!r}, <tensor of shape {tuple(value.shape)}>): log one element, e.g. its mean."
            )
        return value.reshape(())

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, (str, bytes, dict, list, tuple)) or not hasattr(value, "__float__"):
            raise MetricError(
                f"self.log({name!r}, {value!r}): log a number or a tensor with one element; use log_dict for a mapping."
            )
        return float(value)

    def _new_slot(self, name: str, arguments: tuple[Any, ...], sync_dist_group: Any) -> _Slot:
        prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist, add_dataloader_idx, rank_zero_only = arguments
        hook = self.hook
        if hook in _STEP_HOOKS:
            step, epoch = True, False
        elif hook in _BATCH_HOOKS:
            step, epoch = False, True
        elif hook in _EPOCH_HOOKS:
            step, epoch = False, True
            if on_step:
                raise MetricError(f"self.log({name!r}, ..., on_step=True) in {hook}: there is no step in it.")
        else:
            raise MetricError(
                f"self.log({name!r}, ...) in {hook or 'a hook outside the loops'}: logging works in steps and in the "
                f"hooks around batches and epochs."
            )
        if on_step is not None and on_epoch is None:
            epoch = epoch if on_step else True
        step = step if on_step is None else on_step
        epoch = epoch if on_epoch is None else on_epoch
        if not step and not epoch:
            raise MetricError(f"self.log({name!r}, ..., on_step=False, on_epoch=False) has no effect; set one to True.")
        if not isinstance(name, str) or not name:
            raise MetricError(f"self.log({name!r}, ...): give a name.")
        if sync_dist_group is not None:
            raise MetricError(f"self.log({name!r}, ..., sync_dist_group=...): metrics are reduced over all workers.")
        reduction = "custom" if callable(reduce_fx) else _REDUCTIONS.get(str(reduce_fx).lower())
        if reduce_fx in (torch.mean, torch.sum, torch.min, torch.max, torch.amin, torch.amax):
            reduction = reduce_fx.__name__.replace("amin", "min").replace("amax", "max")
        if reduction is None:
            raise MetricError(
                f"self.log({name!r}, ..., reduce_fx={reduce_fx!r}): give one of {sorted(_REDUCTIONS)}, or a function."
            )
        loader = self.loader_idx if add_dataloader_idx else None
        full = name if loader is None else f"{name}/dataloader_idx_{loader}"
        shown = logger is not False
        once = self._whole is not None
        spec = MetricSpec(full, step, epoch, prog_bar, shown, sync_dist, reduction, rank_zero_only, loader, once)
        slot = _Slot(spec, arguments, reduce_fx if reduction == "custom" else None)
        restored = self._slots.get((hook, name, loader))
        if restored is not None:
            slot.folded, slot.custom = restored.folded, restored.custom
        self._slots[hook, name, loader] = slot
        return slot

    def note_row(self, step: int, epoch: int) -> None:
        """Keep the values logged since the batch began as a row for the loggers."""
        row = [
            (slot.spec.step_name, slot.last)
            for slot in self._slots.values()
            if slot.spec.logger and slot.spec.on_step and slot.moment == self.moment and self._tells_steps(slot.spec)
        ]
        if row:
            self._rows.append((step, epoch, row))

    def _tells_steps(self, spec: MetricSpec) -> bool:
        """Whether this worker's step values are wanted."""
        return self.rank == 0 or (spec.sync_dist and self._counts(spec))

    def note_samples(self, step: int, epoch: int, samplers: Sequence[Callable[[], dict[str, float]]]) -> None:
        """Keep what is measured of this worker right now as a row for the loggers."""
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
            self._add_epoch(report)
        return report

    def finish_report(self) -> MetricReport:
        """Wait for what `begin_report` has had fetched, and give it."""
        report = MetricReport()
        begun, self._begun = self._begun, []
        for taken_up in begun:
            report.add(taken_up())
        return report

    def begin_report(self) -> None:
        """Have everything since the last report fetched. What is logged from now on is left for the next report."""
        rows, samples, calls = self._rows.copy(), self._samples, self.calls()
        self._rows.clear()
        self._samples = []
        values = [value for _, _, row in rows for _, value in row]
        taken: list[tuple[_Slot, bool, list[int]]] = []
        for slot in self._slots.values():
            taken.append((slot, slot.last is not None, slot.weight))
            if slot.last is not None:
                values.append(slot.last)
            values += slot.pending
            slot.last, slot.pending, slot.weight = None, [], []
        fetched, wait = begin_fetch(values), self.mark()

        def taken_up() -> MetricReport:
            wait()  # also where nothing is logged: else what a chunk takes would be unknown
            numbers = iter(fetched())
            report = MetricReport(samples=samples, calls=calls)
            for step, epoch, row in rows:
                report.rows.append(StepRow(step, epoch, {name: next(numbers) for name, _ in row}))
            for slot, has_last, weights in taken:
                if has_last:
                    last = next(numbers)
                    report.specs[slot.spec.name] = slot.spec
                    if self._tells_steps(slot.spec):
                        report.step[slot.spec.name] = last
                if weights:
                    self._fold(slot, [next(numbers) for _ in weights], weights)
            return report

        self._begun.append(taken_up)

    def _add_epoch(self, report: MetricReport) -> None:
        """This worker's shares of the epoch's values, which begin anew."""
        for slot in self._slots.values():
            spec = slot.spec
            if spec.on_epoch and slot.logged:
                report.specs[spec.name] = spec
                report.epoch[spec.name] = Partial(0.0, 0.0)
                slot.logged = False
            elif spec.on_epoch and (slot.folded or slot.custom):
                report.specs[spec.name] = spec
                total, weight = slot.folded or (0.0, 0.0)
                share = Partial(total, weight, tuple(slot.custom), slot.fx)
                if not self._counts(spec):
                    share = Partial(_NEUTRAL.get(spec.reduce, 0.0), 0.0, (), slot.fx)
                report.epoch[spec.name] = share
                slot.folded, slot.custom = [], []

    def sums(self) -> list[dict[str, Any]]:
        """The training epoch's sums so far as plain values, for a checkpoint; call after `report`."""
        return [
            {
                "key": list(key),
                "spec": vars(slot.spec).copy(),
                "folded": list(slot.folded),
                "custom": list(slot.custom),
            }
            for key, slot in self._ledgers["train"].slots.items()
            if slot.folded or slot.custom or slot.logged
        ]

    def take_sums(self, saved: list[dict[str, Any]]) -> None:
        """Go on from sums that `sums` gave."""
        self.clear()
        for item in saved:
            hook, name, loader_idx = item["key"]
            slot = _Slot(MetricSpec(**item["spec"]), None, None)
            slot.folded, slot.custom = list(item["folded"]), list(item["custom"])
            if slot.spec.metric is not None:
                slot.metric, slot.logged = self.root.get_submodule(slot.spec.metric), True
            self._slots[hook, name, loader_idx] = slot

    def local_values(self) -> dict[str, float]:
        """This worker's own epoch values so far; call after `report`."""
        values = {}
        for slot in self._slots.values():
            if slot.folded:
                total, weight = slot.folded
                mean = slot.spec.reduce == "mean"
                values[slot.spec.name] = values[slot.spec.epoch_name] = total / weight if mean and weight else total
        return values

    @staticmethod
    def _fold(slot: _Slot, values: list[float], weights: list[int]) -> None:
        reduce = slot.spec.reduce
        if reduce == "custom":
            slot.custom += values
        else:
            total, weight = slot.folded or (None, 0.0)
            if reduce == "mean":
                total = (total or 0.0) + sum(v * w for v, w in zip(values, weights, strict=True))
            elif reduce == "sum":
                total = (total or 0.0) + sum(values)
            else:
                pick = min if reduce == "min" else max
                total = pick(values) if total is None else pick(total, *values)
            slot.folded = [total, weight + sum(weights)]


def begin_fetch(values: Sequence[Any]) -> Callable[[], list[float]]:
    """Have numbers and scalar tensors fetched; what this returns waits for that, and gives them as floats, in order.

    Tensors of one device and type travel together, and a GPU's beside what it is given to do later.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            groups.setdefault((value.device, value.dtype), []).append(index)
    travelling = [
        (indices, *_to_host(torch.stack([values[i] for i in indices]), device))
        for (device, _), indices in groups.items()
    ]

    def fetched() -> list[float]:
        floats = list(values)
        for indices, arrived, numbers in travelling:
            if arrived is not None:
                arrived.synchronize()
            for index, number in zip(indices, numbers.tolist(), strict=True):
                floats[index] = number
        return [float(value) for value in floats]

    return fetched


def _to_host(tensor: Tensor, device: torch.device) -> tuple[torch.cuda.Event | None, Tensor]:
    """A tensor that will be in main memory once the event, if there is one, has come."""
    if device.type != "cuda":
        return None, tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(device))
    return arrived, host
