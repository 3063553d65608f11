"""Stop training after a time, and tell how much of it is left."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from raytrainer.callbacks.callback import Callback
from raytrainer.plan import argument_checks as checks

if TYPE_CHECKING:
    from raytrainer.callbacks.running_trainer import RunningTrainer
    from raytrainer.messages import TrainReport
    from raytrainer.module import Module

__all__ = ["Timer"]

log = logging.getLogger("raytrainer")

_STAGES = ("train", "sanity", "validate", "test", "predict")


class Timer(Callback):
    """Measures each stage, and asks to stop when training has taken `duration`.

    The time that training takes includes the validations within it, and what it took before it was resumed. As with any
    request to stop, `min_epochs` and `min_steps` come first.

    Args:
        duration: "DD:HH:MM:SS", a timedelta, or its arguments as a dict; None: only measure.
        interval: When to look: "step": about once a second, at the end of a chunk of batches; "epoch": at its end.
        verbose: Log it when the time is over.

    Raises:
        ConfigurationError: No such duration or interval.
    """

    def __init__(
        self,
        duration: str | timedelta | Mapping[str, int] | None = None,
        interval: str = "step",
        verbose: bool = True,
    ) -> None:
        self.duration = checks.duration("Timer(duration)", duration)
        self.interval = checks.choice("Timer(interval)", interval, ("step", "epoch"))
        self.verbose = verbose
        self._began: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self._before = 0.0  # seconds of training before it was resumed
        self._loaded = 0.0  # the same, until training begins
        self._training = False  # from then until the run is over, however it ends

    def start_time(self, stage: str = "train") -> float | None:
        """When the stage last began, on the clock of `time.monotonic`; None: not yet."""
        return self._began.get(_known(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """When it last ended; None: not yet."""
        return self._ended.get(_known(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds that the stage ("train", "sanity", "validate", "test" or "predict") has taken, the last time."""
        before = self._before if stage == "train" else 0.0
        began = self.start_time(stage)
        if began is None:
            return before
        return self._ended.get(stage, time.monotonic()) - began + before

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds of `duration` that are left, not below 0; None without a duration."""
        return None if self.duration is None else max(0.0, self.duration - self.time_elapsed(stage))

    def on_train_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Start the clock; nothing is left where a resumed run has had its time."""
        self._before, self._loaded, self._training = self._loaded, 0.0, True
        self._start("train")
        self._check(trainer)

    def on_train_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Stop the clock."""
        self._ended["train"] = time.monotonic()

    def teardown(self, trainer: RunningTrainer, module: Module, stage: str) -> None:
        """The next run has all of its time, whether or not this one has come to its end."""
        if self._training and "train" not in self._ended:
            self._ended["train"] = time.monotonic()
        self._loaded, self._training = 0.0, False

    def on_train_chunk_end(self, trainer: RunningTrainer, module: Module, report: TrainReport) -> None:
        """Look."""
        if self.interval == "step":
            self._check(trainer)

    def on_train_epoch_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Look."""
        self._check(trainer)

    def on_validation_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Start a clock."""
        self._start("sanity" if trainer.sanity_checking else "validate")

    def on_validation_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Stop it."""
        self._ended["sanity" if trainer.sanity_checking else "validate"] = time.monotonic()

    def on_test_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Start a clock."""
        self._start("test")

    def on_test_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Stop it."""
        self._ended["test"] = time.monotonic()

    def on_predict_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Start a clock."""
        self._start("predict")

    def on_predict_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Stop it."""
        self._ended["predict"] = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training so far, in this run and those it was resumed from."""
        return {"train": self.time_elapsed() if self._training else self._loaded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._before = state_dict["train"]
        if self._training:  # a worker was lost: training goes on without another `on_train_start`
            self._start("train")
        else:
            self._loaded = self._before

    def _start(self, stage: str) -> None:
        self._began[stage] = time.monotonic()
        self._ended.pop(stage, None)

    def _check(self, trainer: RunningTrainer) -> None:
        if self.duration is None or self.time_elapsed() < self.duration or trainer.should_stop:
            return
        trainer.should_stop = True
        if self.verbose:
            log.info("Timer asks to stop: training has taken %s.", timedelta(seconds=round(self.time_elapsed())))


def _known(stage: str) -> str:
    return str(checks.choice("stage", stage, _STAGES))
