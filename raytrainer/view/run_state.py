"""`RunState`: where a run is, as the coordinator writes it and the Trainer shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from raytrainer.metric_messages import News
from raytrainer.metrics.metric_board import MetricBoard
from raytrainer.plan.phase_clock import PhaseClock, TimeReport
from raytrainer.plan.recoveries import Recovery
from raytrainer.plan.steps_and_epochs import Progress

__all__ = ["RunState", "TrainerState", "nothing"]


@dataclass
class TrainerState:
    """What the trainer does.

    Attributes:
        fn: "fit", "validate", "test", "predict", or None before any.
        status: "initializing", "running", "finished", "interrupted" or "failed".
        stage: What ran last: "sanity", "train", "validate", "test" or "predict".
    """

    fn: str | None = None
    status: str = "initializing"
    stage: str | None = None

    @property
    def has_begun(self) -> bool:
        """Whether workers train, or validate what they have trained."""
        return self.stage in ("train", "validate")

    @property
    def running_stage(self) -> str | None:
        """`stage`, while something runs; before its first stage, the one that it is about."""
        if self.status not in ("initializing", "running"):
            return None
        return self.stage or {"fit": "train"}.get(str(self.fn), self.fn)

    @property
    def finished(self) -> bool:
        return self.status == "finished"


def nothing() -> None:
    """What there is to catch up while nothing runs."""


@dataclass
class RunState:
    """Counters, lengths and metrics of one trainer. Lengths are in batches per worker; None where unknown."""

    trainer: TrainerState = field(default_factory=TrainerState)
    progress: Progress = field(default_factory=Progress)
    board: MetricBoard = field(default_factory=MetricBoard)
    should_stop: bool = False
    resumed_from: str | None = None  # the checkpoint that a fit went on from
    interrupted: bool = False
    preempted: bool = False
    sanity_checking: bool = False
    num_training_batches: int | None = None
    batch_size: int | None = None
    num_batches: dict[str, list[int | None]] = field(default_factory=dict)  # by "sanity", "validate", ...
    world_size: int = 1
    parts: int = 1  # batches that the workers read at the same time
    keeps_end: bool = False  # whether the state at the end of a fit is kept, for a checkpoint later
    closing: bool = False  # the epoch is over for the workers; callbacks are being told
    about_to_validate: bool = False  # a validation follows the chunk of which callbacks are being told
    plateaus: dict[int, int] = field(default_factory=dict)  # see `Plateaus`
    recoveries: list[Recovery] = field(default_factory=list)
    skipped_steps: int = 0
    clock: PhaseClock = field(default_factory=PhaseClock)
    time_report: TimeReport | None = None  # once a fit has ended, however
    profiles: list[bytes | None] = field(default_factory=list)  # of each worker, by rank, where there is a profiler
    peak_memory_bytes: list[int] = field(default_factory=list)  # of each worker's GPU, by rank; empty on CPUs
    catch_up: Callable[[], None] = nothing  # takes up what workers have still to report to `board`

    def news(self) -> News:
        """What workers have not been told yet; they are told by the caller."""
        return News(self.board.take_news(), self.should_stop)
