"""What workers report of what is logged, and what becomes of it: plain values. Imports nothing of the package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

__all__ = ["LogCall", "MetricReport", "MetricSpec", "News", "Number", "Partial", "ReadSample", "Reduced", "StepRow"]

#: What is logged, with all its digits: an int where the value was one.
Number: TypeAlias = float | int


@dataclass(frozen=True)
class MetricSpec:
    """How a logged name wants to be treated; equal for all calls that log it in one hook.

    Of several evaluation loaders, `name` ends in the one that it belongs to: "loss/dataloader_idx_1".
    """

    name: str
    on_step: bool
    on_epoch: bool
    prog_bar: bool
    logger: bool
    sync_dist: bool
    reduce: str  # "mean", "sum", "min", "max" or "custom"
    rank_zero_only: bool = False
    loader: int | None = None  # the evaluation loader it belongs to, where there are several
    once_per_node: bool = False  # all workers of a node log the same value: the first one's counts
    metric: str | None = None  # where the module has the torchmetrics object whose value this is

    @property
    def step_name(self) -> str:
        return self._forked("step")

    @property
    def epoch_name(self) -> str:
        return self._forked("epoch")

    def _forked(self, kind: str) -> str:
        if not (self.on_step and self.on_epoch):
            return self.name
        of_loader = "" if self.loader is None else f"/dataloader_idx_{self.loader}"
        return f"{self.name.removesuffix(of_loader)}_{kind}{of_loader}"


@dataclass(frozen=True)
class Partial:
    """One worker's share of an epoch value. `values` is set for custom reductions only (with `fx`).

    `loaders` are those in whose batches it was logged, where there are several and its name says none. Of a metric
    object, `weight` counts its updates.
    """

    total: Number
    weight: Number
    values: tuple[Number, ...] = ()
    fx: Any = None
    loaders: tuple[int, ...] = ()


@dataclass
class Reduced:
    """Values of an epoch or evaluation over all workers, by where they are shown.

    Attributes:
        callback: In `callback_metrics`: by name, and by full name where the two differ.
        logged: In `logged_metrics`, by full name.
        progress: In `progress_bar_metrics`, likewise.
        loaders: Those in whose batches a name was logged, where there are several and the name says none.
    """

    callback: dict[str, Number] = field(default_factory=dict)
    logged: dict[str, Number] = field(default_factory=dict)
    progress: dict[str, Number] = field(default_factory=dict)
    loaders: dict[str, list[int]] = field(default_factory=dict)

    def add(self, later: Reduced) -> None:
        """Take up values that follow these."""
        self.callback |= later.callback
        self.logged |= later.logged
        self.progress |= later.progress


@dataclass(frozen=True)
class News:
    """What workers are told before they go on.

    Attributes:
        metrics: Values over all workers that they have not been told yet.
        stop: Whether the end of training has been asked for, by whomever.
    """

    metrics: Reduced | None = None
    stop: bool = False


@dataclass(frozen=True)
class StepRow:
    """Values to log at one step, by logged name."""

    step: int
    epoch: int
    values: dict[str, Number]


@dataclass(frozen=True)
class LogCall:
    """A call of a method of `self.logger`, to be made again on the driver's loggers.

    Attributes:
        name: The method.
        args: Its arguments, tensors in main memory.
        kwargs: Those given by name.
        hook: The hook in which it was called.
        position: Where in the run, comparable with others of the same hook.
        step: The step to log at, where the method takes one and none was given; None: the driver knows.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hook: str | None = None
    position: tuple[int, ...] = ()
    step: int | None = None


@dataclass(frozen=True)
class ReadSample:
    """Fingerprints of the first batches that a worker has read from a loader which it shares out itself.

    Attributes:
        loader: As in "the train loader".
        part: Which part of the data it is to read.
        batches: How many batches.
        leaves: The batches' hashes by leaf, of those that say enough to tell parts apart.
        advice: What to write if workers read the same.
        dataset: What tells one dataset from another, where parts of it are dealt out by number.
    """

    loader: str
    part: int
    batches: int
    leaves: dict[str, tuple[int, ...]]
    advice: str
    dataset: int | None = None


@dataclass
class MetricReport:
    """What was logged since the last report.

    `step` holds each name's latest step value; `epoch` holds this worker's share of every epoch value, and is only
    filled in when the epoch (or evaluation) ends. `calls` are those of `self.logger`, on rank 0, in order. `fx` has the
    reductions of step values that are no names. `stop`: the module or a worker callback has asked the run to stop.
    """

    specs: dict[str, MetricSpec] = field(default_factory=dict)
    rows: list[StepRow] = field(default_factory=list)
    step: dict[str, Number] = field(default_factory=dict)
    epoch: dict[str, Partial] = field(default_factory=dict)
    samples: list[StepRow] = field(default_factory=list)  # of this worker alone
    idle: bool = False  # this worker had no sample in the epoch, so it need not have logged what others did
    trained: bool = False  # whether training's batches of this worker, in this epoch, came to any loss, or step
    calls: list[LogCall] = field(default_factory=list)
    fx: dict[str, Any] = field(default_factory=dict)
    stop: bool = False
    reads: tuple[ReadSample, ...] = ()  # what loaders gave first

    def shared(self) -> MetricReport:
        """What counts of it where it is not rank 0's: step values that are reduced over workers, and the epoch's."""
        names = {name for name, spec in self.specs.items() if spec.sync_dist}
        if len(names) < len(self.specs):
            by_row = {self.specs[name].step_name for name in names}
            self.step = {name: value for name, value in self.step.items() if name in names}
            self.rows = [
                StepRow(row.step, row.epoch, {name: v for name, v in row.values.items() if name in by_row})
                for row in (self.rows if by_row else ())
            ]
        self.specs = {name: self.specs[name] for name in self.epoch}
        return self

    def add(self, later: MetricReport) -> None:
        """Take up a report on steps that follows this one."""
        self.specs |= later.specs
        self.rows += later.rows
        self.step |= later.step
        self.samples += later.samples
        self.calls += later.calls
        self.fx |= later.fx
