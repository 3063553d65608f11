"""What workers report to the driver: plain values and state. Imports nothing of the package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Difference",
    "EvaluationReport",
    "EvaluationStart",
    "Fingerprints",
    "FinishReport",
    "LogCall",
    "MetricReport",
    "MetricSpec",
    "Partial",
    "ReadSample",
    "SetupReport",
    "StepRow",
    "TrainReport",
    "TrainStart",
]


@dataclass(frozen=True)
class MetricSpec:
    """How a logged name wants to be treated; equal for all calls that log it in one hook."""

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
        return f"{self.name}_step" if self.on_step and self.on_epoch else self.name

    @property
    def epoch_name(self) -> str:
        return f"{self.name}_epoch" if self.on_step and self.on_epoch else self.name


@dataclass(frozen=True)
class Partial:
    """One worker's share of an epoch value. `values` is set for custom reductions only (with `fx`)."""

    total: float
    weight: float
    values: tuple[float, ...] = ()
    fx: Any = None


@dataclass(frozen=True)
class StepRow:
    """Values to log at one step, by logged name."""

    step: int
    epoch: int
    values: dict[str, float]


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
    """

    loader: str
    part: int
    batches: int
    leaves: dict[str, tuple[int, ...]]
    advice: str


@dataclass
class MetricReport:
    """What was logged since the last report.

    `step` holds each name's latest step value; `epoch` holds this worker's share of every epoch value, and is only
    filled in when the epoch (or evaluation) ends. `calls` are those of `self.logger`, on rank 0, in order.
    """

    specs: dict[str, MetricSpec] = field(default_factory=dict)
    rows: list[StepRow] = field(default_factory=list)
    step: dict[str, float] = field(default_factory=dict)
    epoch: dict[str, Partial] = field(default_factory=dict)
    samples: list[StepRow] = field(default_factory=list)  # of this worker alone
    idle: bool = False  # this worker had no sample in the epoch, so it need not have logged what others did
    calls: list[LogCall] = field(default_factory=list)
    reads: tuple[ReadSample, ...] = ()  # what loaders gave first

    def add(self, later: MetricReport) -> None:
        """Take up a report on steps that follows this one."""
        self.specs |= later.specs
        self.rows += later.rows
        self.step |= later.step
        self.samples += later.samples
        self.calls += later.calls


@dataclass
class SetupReport:
    """What a worker learnt while setting up.

    Attributes:
        rank: Its rank.
        plateau_steps: Every so many optimizer steps, a scheduler waits for a metric.
        plateau_epochs: Whether a scheduler waits for a metric at the end of epochs.
        has_validation: Whether there is something to validate with.
        parts: Batches that the group reads at the same time: one per worker, per node (ddp2), or in all (dp).
        shape: What the strategy says of the form that it has given the module, if that is worth a line.
    """

    rank: int
    plateau_steps: tuple[int, ...] = ()
    plateau_epochs: bool = False
    has_validation: bool = False
    parts: int = 1
    shape: str | None = None


@dataclass
class TrainStart:
    """The loaders of a worker that is about to train, in batches after their limits; None where unknown.

    Attributes:
        batches: The training loader's.
        batch_size: Samples per batch, where the loader says.
        val_batches: The validation loaders'.
    """

    batches: int | None
    batch_size: int | None = None
    val_batches: list[int | None] = field(default_factory=list)


@dataclass
class TrainReport:
    """One chunk of training on one worker.

    Attributes:
        batches: Batches trained in this chunk.
        batch: Batches trained in this epoch so far.
        step: Optimizer steps in the whole run so far.
        seconds: Wall time of the chunk.
        exhausted: The loader ended, or `on_train_batch_start` returned -1.
        stop: The module or a worker callback asked the run to stop.
        data_seconds: Share of `seconds` spent waiting for the loader.
        metrics: What was logged.
        skipped_steps: Steps in the whole run so far that were left out for infinite gradients.
        behind: What the last batch has logged is not in `metrics`, but comes with the next report.
    """

    batches: int
    batch: int
    step: int
    seconds: float
    exhausted: bool
    stop: bool
    data_seconds: float
    metrics: MetricReport
    skipped_steps: int = 0
    behind: bool = False


@dataclass(frozen=True)
class Fingerprints:
    """Numbers for what a worker holds, by the tensor's name. Buffers may differ where each worker changes its own."""

    parameters: dict[str, int]
    buffers: dict[str, int]


@dataclass(frozen=True)
class Difference:
    """How a tensor differs from that of rank 0.

    Attributes:
        largest: Of all its elements' differences; not a number where one has no number.
        scale: Rank 0's largest element.
        rounding: How large a difference may come of rounding, relative to `scale`.
    """

    largest: float
    scale: float
    rounding: float


@dataclass
class EvaluationStart:
    """An evaluation's loaders on this worker.

    Attributes:
        batches: Of each loader, after limits; None where unknown.
        nothing: No worker has any batch, so there is no evaluation.
    """

    batches: list[int | None]
    nothing: bool = False


@dataclass
class EvaluationReport:
    """One chunk of validation, test or prediction on one worker.

    Attributes:
        stage: "validate", "test" or "predict".
        batches: Batches done since the evaluation began, over all loaders.
        seconds: Wall time of the chunk.
        done: All loaders are through.
        metrics: What was logged; epoch values only when done.
        predictions: For "predict": (loader, batch index in the whole loader, output) of this chunk.
        by_loader: Batches done of each loader, when the evaluation has ended.
        behind: What the last batch has logged is not in `metrics`, but comes with the next report.
    """

    stage: str
    batches: int
    seconds: float
    done: bool
    metrics: MetricReport
    predictions: list[tuple[int, int, Any]] = field(default_factory=list)
    by_loader: list[int] = field(default_factory=list)
    behind: bool = False


@dataclass
class FinishReport:
    """What comes home at the end. State is sent by rank 0 only."""

    state_dict: dict[str, Any] | None = None
    hparams: dict[str, Any] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    datamodule_state: dict[str, Any] | None = None
    peak_memory_bytes: int | None = None
    calls: list[LogCall] = field(default_factory=list)  # of `self.logger`, since the last report
    profile: bytes | None = None  # this worker's, where there is a profiler and it has recorded something
