"""What a worker keeps of each name that is logged, and what the options of `self.log` mean in each hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from raytrainer.errors import MetricError
from raytrainer.metric_messages import MetricSpec, Number, Partial
from raytrainer.metrics.metric_objects import reset, updates_of

__all__ = [
    "NEUTRAL",
    "Ledger",
    "LogOptions",
    "Slot",
    "joined_sums",
    "refuse_other_options",
    "refuse_shared",
    "spec_for",
]

#: The options of `Module.log` that must be the same in each call, in this order: prog_bar, logger, on_step, on_epoch,
#: reduce_fx, sync_dist, add_dataloader_idx, rank_zero_only. A plain tuple, since each call makes and compares one.
LogOptions: TypeAlias = tuple[bool, bool | None, bool | None, bool | None, Any, bool, bool, bool]

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
NEUTRAL = {"min": float("inf"), "max": float("-inf")}


class Slot:
    """One name in one hook: how it is treated, its latest value, and the values of the epoch not yet fetched."""

    __slots__ = (
        "custom",
        "dtype",
        "folded",
        "fx",
        "kept",
        "last",
        "loaders",
        "logged",
        "metric",
        "moment",
        "options",
        "pending",
        "recent",
        "reduced",
        "shown",
        "spec",
        "total",
        "weight",
    )

    def __init__(self, spec: MetricSpec, options: LogOptions | None, fx: Any) -> None:
        self.spec, self.options, self.fx = spec, options, fx
        self.last: Any = None  # latest step value, until it is reported
        self.dtype: torch.dtype | None = None  # of the tensor that was logged, where its number is kept instead
        self.shown: Any = None  # the latest that was reported in this epoch
        self.reduced = False  # the module sees the epoch's value over all workers
        self.moment = -1  # batch in which it was logged
        self.pending: list[Any] = []  # values of this epoch, on the device
        self.recent = 0  # how many of these are of that batch
        self.weight: list[int] = []  # their batch sizes
        self.folded: list[Number] = []  # [total, weight] of values fetched before
        self.metric: Any = None  # the torchmetrics object that is logged here
        self.logged = False  # it has been, in this epoch
        self.custom: list[Number] = []  # all values fetched before, for a custom reduction
        self.loaders: set[int] = set()  # those in whose batches it was logged, where its name says none

    def fold(self, values: list[Number], weights: list[int]) -> None:
        """Take values that have been fetched, with their batch sizes, into the epoch's."""
        reduce = self.spec.reduce
        if reduce == "custom":
            self.custom += values
        else:
            total, weight = self.folded or (None, 0)
            if reduce == "mean":
                total = (total or 0) + sum(v * w for v, w in zip(values, weights, strict=True))
            elif reduce == "sum":
                total = (total or 0) + sum(values)
            else:
                pick = min if reduce == "min" else max
                total = pick(values) if total is None else pick(total, *values)
            self.folded = [total, weight + sum(weights)]

    def begin_epoch(self) -> None:
        """The epoch's value begins anew; a metric object that has one does when that has been computed."""
        self.folded, self.custom, self.loaders = [], [], set()
        if self.logged and not self.spec.on_epoch:
            reset(self.metric)
        self.shown, self.logged, self.reduced = None, False, False

    def share(self, counts: bool) -> Partial | None:
        """This worker's share of the epoch's value, of what has been folded; None: it has none."""
        if self.logged:
            return Partial(0, updates_of(self.metric), loaders=tuple(sorted(self.loaders)))
        if not self.folded and not self.custom:
            return None
        if not counts:
            return Partial(NEUTRAL.get(self.spec.reduce, 0), 0, (), self.fx, tuple(sorted(self.loaders)))
        total, weight = self.folded or (0, 0)
        return Partial(total, weight, tuple(self.custom), self.fx, tuple(sorted(self.loaders)))


class Ledger:
    """Slots by (hook, name, loader), and rows kept for the loggers: (step, epoch, [(slot, value)])."""

    def __init__(self) -> None:
        self.slots: dict[tuple[str | None, str, int | None], Slot] = {}
        self.rows: list[tuple[int, int, list[tuple[Slot, Any]]]] = []

    def reset_metrics(self) -> None:
        """Bring the metric objects to their beginning."""
        for slot in self.slots.values():
            if slot.metric is not None:
                reset(slot.metric)

    def row(self, since: int, tells: Callable[[MetricSpec], bool]) -> list[tuple[Slot, Any]]:
        """The latest step values for the loggers, of slots logged after a moment that this worker tells."""
        return [
            (slot, slot.shown if slot.last is None else slot.last)
            for slot in self.slots.values()
            if slot.spec.logger and slot.spec.on_step and slot.moment > since and tells(slot.spec)
        ]

    def clear(self) -> None:
        """Forget everything."""
        self.reset_metrics()
        self.slots.clear()
        self.rows.clear()

    def sums(self) -> list[dict[str, Any]]:
        """The epoch's sums so far as plain values."""
        return [
            {
                "key": list(key),
                "spec": vars(slot.spec).copy(),
                "folded": list(slot.folded),
                "custom": list(slot.custom),
                "loaders": sorted(slot.loaders),
            }
            for key, slot in self.slots.items()
            if slot.folded or slot.custom or slot.logged
        ]

    def take_sums(self, saved: list[dict[str, Any]], root: nn.Module) -> None:
        """Go on from sums that `sums` gave; metric objects are found in `root`."""
        self.clear()
        for item in saved:
            hook, name, loader_idx = item["key"]
            slot = Slot(MetricSpec(**item["spec"]), None, None)
            slot.folded, slot.custom = list(item["folded"]), list(item["custom"])
            slot.loaders = set(item.get("loaders", ()))
            if slot.spec.metric is not None:
                slot.metric, slot.logged = root.get_submodule(slot.spec.metric), True
            self.slots[hook, name, loader_idx] = slot


def joined_sums(several: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The sums of several workers as those of one; but for metric objects, whose states are elsewhere."""
    joined: dict[tuple[Any, ...], dict[str, Any]] = {}
    for item in (item for sums in several for item in sums):
        found = joined.setdefault(tuple(item["key"]), {**item, "folded": [], "custom": [], "loaders": []})
        if item["folded"]:
            total, weight = item["folded"]
            if found["folded"]:
                pick = {"min": min, "max": max}.get(item["spec"]["reduce"], lambda one, other: one + other)
                total, weight = pick(found["folded"][0], total), found["folded"][1] + weight
            found["folded"] = [total, weight]
        found["custom"] = found["custom"] + item["custom"]
        found["loaders"] = sorted({*found["loaders"], *item.get("loaders", ())})
    return list(joined.values())


def spec_for(name: str, options: LogOptions, hook: str | None, loader: int | None, once_per_node: bool) -> MetricSpec:
    """What `self.log(name, ..., **options)` in a hook asks for.

    Raises:
        MetricError: The hook allows no logging, or the options contradict it.
    """
    prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist, _, rank_zero_only = options
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
            f"hooks around batches and epochs. (A Callback runs on the driver, beside them: derive it from "
            f"WorkerCallback.)"
        )
    if on_step is not None and on_epoch is None:
        epoch = epoch if on_step else True
    step = step if on_step is None else on_step
    epoch = epoch if on_epoch is None else on_epoch
    if not step and not epoch:
        raise MetricError(f"self.log({name!r}, ..., on_step=False, on_epoch=False) has no effect; set one to True.")
    if not isinstance(name, str) or not name:
        raise MetricError(f"self.log({name!r}, ...): give a name.")
    if "/dataloader_idx_" in name:
        raise MetricError(
            f"self.log({name!r}, ...): the loader is added to the name where there are several, unless it is logged "
            f"with add_dataloader_idx=False; leave it out."
        )
    reduction = "custom" if callable(reduce_fx) else _REDUCTIONS.get(str(reduce_fx).lower())
    if reduce_fx in (torch.mean, torch.sum, torch.min, torch.max, torch.amin, torch.amax):
        reduction = reduce_fx.__name__.replace("amin", "min").replace("amax", "max")
    if reduction is None:
        raise MetricError(
            f"self.log({name!r}, ..., reduce_fx={reduce_fx!r}): give one of {sorted(_REDUCTIONS)}, or a function."
        )
    full = name if loader is None else f"{name}/dataloader_idx_{loader}"
    shown = logger is not False
    return MetricSpec(full, step, epoch, prog_bar, shown, sync_dist, reduction, rank_zero_only, loader, once_per_node)


def refuse_other_options(slot: Slot, options: LogOptions, hook: str | None, name: str) -> None:
    """A name has one set of options in a hook; a function that is written in the call is a new object each time.

    Raises:
        MetricError: The options differ from those of earlier calls.
    """
    if slot.options is None or _told(slot.options) != _told(options):
        raise MetricError(
            f"self.log({name!r}, ...) was called in {hook} with other options than before; use the same options, or "
            f"another name."
        )


def _told(options: LogOptions) -> tuple[Any, ...]:
    """What options say: a function by its code, unless it has values of its own."""
    fx = options[4]
    return *options[:4], fx if getattr(fx, "__closure__", None) else getattr(fx, "__code__", fx), *options[5:]


def refuse_shared(ledgers: Mapping[str, Ledger], current: Ledger, hook: str | None, name: str, metric: Any) -> None:
    """Training and validation must not update one object: a validation within an epoch would take its batches.

    Raises:
        MetricError: They do.
    """
    for key, ledger in ledgers.items():
        if ledger is not current and any(slot.metric is metric for slot in ledger.slots.values()):
            there = "training" if key == "train" else "validation"
            raise MetricError(
                f"self.log({name!r}, <{type(metric).__name__}>) in {hook}: {there} logs the same metric object, which "
                f"would mix both; use one object a stage, as self.train_acc and self.val_acc."
            )
