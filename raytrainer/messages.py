"""What workers report to the driver: plain values and state. What is logged is in `metric_messages.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raytrainer.metric_messages import LogCall, MetricReport

__all__ = [
    "Difference",
    "EvaluationReport",
    "EvaluationStart",
    "Fingerprints",
    "FinishReport",
    "PlateauWish",
    "SetupReport",
    "TrainReport",
    "TrainStart",
]


@dataclass(frozen=True)
class PlateauWish:
    """A scheduler that waits for a metric.

    Attributes:
        index: Its place among the schedulers.
        kind: Its class, for messages.
        monitor: The metric.
        interval: "step" or "epoch".
        frequency: It acts every so many of these.
        strict: Whether it is an error that nobody logs the metric.
    """

    index: int
    kind: str
    monitor: str
    interval: str
    frequency: int
    strict: bool


@dataclass
class SetupReport:
    """What a worker learnt while setting up.

    Attributes:
        rank: Its rank.
        has_validation: Whether there is something to validate with.
        parts: Batches that the group reads at the same time: one per worker, per node (ddp2), or in all (dp).
        shape: What the strategy says of the form that it has given the module, if that is worth a line.
    """

    rank: int
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
        plateaus: The schedulers that wait for a metric.
        stop: The module or a worker callback has asked the run to stop.
        divisible: The rest of an epoch of the training loader can be dealt out to another number of workers.
        trained: Stands for which parameters there are, and which of them train.
        switched: What has changed in that since training was set up: the first few, in words.
        records: Whether this worker writes down after each step what it alone has.
    """

    batches: int | None
    batch_size: int | None = None
    val_batches: list[int | None] = field(default_factory=list)
    plateaus: tuple[PlateauWish, ...] = ()
    stop: bool = False
    divisible: bool = False
    trained: int = 0
    switched: tuple[str, ...] = ()
    records: bool = False


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
        steps: Optimizer steps in this chunk.
        behind: What the last batch has logged is not in `metrics`, but comes with the next report.
        row: The loggers' step of the batch done last.
        leaves: The loader has another batch, but that of another worker has none.
        records: As in `TrainStart`, still.
        validation: The first chunk of one that was to follow at once.
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
    steps: int = 0
    behind: bool = False
    row: int = 0
    leaves: bool = False
    records: bool = False
    validation: EvaluationReport | None = None


@dataclass(frozen=True)
class Fingerprints:
    """Numbers for what a worker holds, by the tensor's name. Buffers may differ where each worker changes its own."""

    parameters: dict[str, int]
    buffers: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)  # of its optimizers: "lr of SGD, group 0": 0.1
    pieces: dict[str, str] = field(default_factory=dict)  # which one it holds, of parameters that are in pieces


@dataclass(frozen=True)
class Difference:
    """How a tensor differs from that of rank 0, or of the first rank that is to hold the same piece.

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
        steady: Nobody sees how the next one starts: there is no hook for it, and loaders and lengths stay.
    """

    batches: list[int | None]
    stop: bool = False  # the module or a worker callback has asked the run to stop
    nothing: bool = False
    steady: bool = False


@dataclass
class EvaluationReport:
    """One chunk of validation, test or prediction on one worker.

    Attributes:
        stage: "validate", "test" or "predict".
        batches: Batches done since the evaluation began, over all loaders.
        seconds: Wall time of the chunk.
        done: All loaders are through.
        metrics: What was logged; when done, also this worker's share of the epoch's values so far.
        predictions: For "predict": (loader, batch index in the whole loader, output) of this chunk.
        by_loader: Batches done of each loader, when the evaluation has ended.
        behind: What the last batch has logged is not in `metrics`, but comes with the next report.
        quiet: There is no hook for its end, so that nothing will be added to this.
        start: Of an evaluation that has been started with this chunk.
        through: The loader has come to its end. How fast it was says nothing of the next one.
    """

    stage: str
    batches: int
    seconds: float
    done: bool
    metrics: MetricReport
    predictions: list[tuple[int, int, Any]] = field(default_factory=list)
    by_loader: list[int] = field(default_factory=list)
    behind: bool = False
    quiet: bool = False
    start: EvaluationStart | None = None
    through: bool = False


@dataclass
class FinishReport:
    """What comes home at the end. State is sent by rank 0 only."""

    state_dict: dict[str, Any] | None = None
    hparams: dict[str, Any] | None = None
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)  # plain ones, by the submodule that has them
    buffers: dict[str, Any] = field(default_factory=dict)  # those that are not in the state dict
    kept_buffers: list[str] = field(default_factory=list)  # names of those that are
    datamodule_state: dict[str, Any] | None = None
    peak_memory_bytes: int | None = None
    calls: list[LogCall] = field(default_factory=list)  # of `self.logger`, since the last report
    profile: bytes | None = None  # this worker's, where there is a profiler and it has recorded something
