"""`TrainerProperties`: counters, metrics, lengths and settings of a trainer, all read from one place."""

from __future__ import annotations

from torch import Tensor

from raytrainer.datamodule import DataModule
from raytrainer.loggers.logger import Logger, first_log_dir
from raytrainer.metrics.metric_board import MetricTime
from raytrainer.module import Module
from raytrainer.plan.phase_clock import TimeReport
from raytrainer.plan.recoveries import Recovery
from raytrainer.plan.settings import Settings
from raytrainer.profilers.profiler import Profiler
from raytrainer.view.run_state import RunState, TrainerState

__all__ = ["TrainerProperties"]


class TrainerProperties:
    """The read-only half of `Trainer`."""

    _settings: Settings
    _state: RunState
    _loggers: list[Logger]
    _module: Module | None
    _datamodule: DataModule | None
    _profiler: Profiler | None
    _default_root_dir: str

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The latest value of every metric, reduced over workers: 0-dim CPU tensors."""
        self._state.catch_up()
        return self._state.board.callback

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The latest value of every metric that is meant for the loggers, by the names that these are given."""
        return self._state.board.logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The latest values logged with `prog_bar=True`."""
        return self._state.board.progress

    def metric_time(self, name: str) -> MetricTime | None:
        """When a metric of `callback_metrics` got its value, for who acts on new ones only; None: nobody knows."""
        self._state.catch_up()
        return self._state.board.times.get(name)

    @property
    def total_batches(self) -> int:
        """Training batches that each worker has done, over all epochs."""
        return self._state.progress.total_batches

    @property
    def epoch_ended(self) -> bool:
        """Whether the epoch in progress has no batch left, and only its end is to come: validation and hooks."""
        return self._state.progress.epoch_ended

    @property
    def about_to_validate(self) -> bool:
        """In `on_train_chunk_end`: whether a validation follows, with the weights that there are now."""
        return self._state.about_to_validate

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self._state.progress.step

    @property
    def current_epoch(self) -> int:
        """Index of the epoch in progress; after `fit`, the number of epochs completed."""
        return self._state.progress.epoch

    @property
    def state(self) -> TrainerState:
        """What was called last, and how it ended."""
        return self._state.trainer

    @property
    def should_stop(self) -> bool:
        """Whether somebody asked training to stop. Set it to ask."""
        return self._state.should_stop

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self._state.should_stop = value

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C, or SIGTERM, ended the last run."""
        return self._state.interrupted

    @property
    def preempted(self) -> bool:
        """Whether SIGTERM ended the last run: its machine is wanted back. See `preemption_grace`."""
        return self._state.preempted

    @property
    def sanity_checking(self) -> bool:
        """Whether the sanity check is running."""
        return self._state.sanity_checking

    @property
    def num_training_batches(self) -> int | None:
        """Training batches per epoch and worker; None where unknown."""
        return self._state.num_training_batches

    @property
    def num_sanity_val_batches(self) -> list[int | None]:
        """Batches of the sanity check, of each validation loader."""
        return self._state.num_batches.get("sanity", [])

    @property
    def num_val_batches(self) -> list[int | None]:
        """Batches per worker of each validation loader; empty if there is no validation."""
        return self._state.num_batches.get("validate", [])

    @property
    def num_test_batches(self) -> list[int | None]:
        """Batches per worker of each test loader."""
        return self._state.num_batches.get("test", [])

    @property
    def num_predict_batches(self) -> list[int | None]:
        """Batches per worker of each prediction loader."""
        return self._state.num_batches.get("predict", [])

    @property
    def world_size(self) -> int:
        """Workers of the last run."""
        return self._state.world_size

    @property
    def global_rank(self) -> int:
        """0: the driver stands for the first worker. A Module's own rank is `self.global_rank`."""
        return 0

    @property
    def is_global_zero(self) -> bool:
        """True: see `global_rank`."""
        return True

    @property
    def training(self) -> bool:
        """Whether a fit trains; False in its validations."""
        return self._state.trainer.running_stage == "train"

    @property
    def validating(self) -> bool:
        """Whether a validation runs, other than the sanity check."""
        return self._state.trainer.running_stage == "validate"

    @property
    def testing(self) -> bool:
        """Whether a test runs."""
        return self._state.trainer.running_stage == "test"

    @property
    def predicting(self) -> bool:
        """Whether a prediction runs."""
        return self._state.trainer.running_stage == "predict"

    @property
    def evaluating(self) -> bool:
        """Whether a validation, test or sanity check runs."""
        return self._state.trainer.running_stage in ("validate", "test", "sanity")

    @property
    def recoveries(self) -> list[Recovery]:
        """Failures that the last run has recovered from: what was lost, replayed, and how long it took."""
        return self._state.recoveries

    @property
    def time_report(self) -> TimeReport | None:
        """What the time of the last run went to, if that was a `fit` that has ended (or failed)."""
        return self._state.time_report

    @property
    def profiler(self) -> Profiler | None:
        """The profiler; after a run, its `files` are the reports of the workers."""
        return self._profiler

    @property
    def skipped_steps(self) -> int:
        """Steps of the last fit that "16-mixed" left out for infinite gradients; `global_step` counts them too."""
        return self._state.skipped_steps

    @property
    def peak_memory_bytes(self) -> list[int]:
        """Most memory that each worker of the last run has had allocated on its GPU, by rank; empty on CPUs."""
        return self._state.peak_memory_bytes

    @property
    def settings(self) -> Settings:
        """The validated settings."""
        return self._settings

    @property
    def default_root_dir(self) -> str:
        """Where logs and checkpoints go, as an absolute path."""
        return self._default_root_dir

    @property
    def logger(self) -> Logger | None:
        """The first logger."""
        return self._loggers[0] if self._loggers else None

    @property
    def loggers(self) -> list[Logger]:
        return self._loggers

    @property
    def log_dir(self) -> str:
        """Folder of the first logger that has one; `default_root_dir` where none has."""
        return first_log_dir(self._loggers) or self.default_root_dir

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint that the run went on from."""
        return self._state.resumed_from

    @property
    def model(self) -> Module | None:
        """The module of the last run."""
        return self._module

    @property
    def lightning_module(self) -> Module | None:
        """`model`, by Lightning's name."""
        return self._module

    @property
    def datamodule(self) -> DataModule | None:
        """The DataModule of the last run."""
        return self._datamodule
