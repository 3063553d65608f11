"""End training when a monitored metric no longer gets better."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from raytrainer.callbacks.callback import Callback
from raytrainer.errors import ConfigurationError
from raytrainer.plan.early_stopping_rule import StoppingRules, StoppingState, StopReason, judge, worst_score
from raytrainer.plan.missing_metric import missing_metric
from raytrainer.plan.monitoring import Moment, MonitorMoment

if TYPE_CHECKING:
    from raytrainer.callbacks.running_trainer import RunningTrainer
    from raytrainer.module import Module

__all__ = ["EarlyStopping"]

_log = logging.getLogger("raytrainer")


class EarlyStopping(Callback):
    """Asks the trainer to stop when `monitor` has not improved for `patience` checks.

    A check is of a new value: where nothing has been logged since the last one, there is none. A run that goes on from
    a checkpoint by which it had been asked to stop stops at once, unless this object allows more: more `patience`, say.

    Args:
        monitor: Name of the metric in `trainer.callback_metrics`.
        min_delta: An improvement must be larger than this; its sign does not matter.
        patience: Checks (not epochs: a check follows each validation) without improvement, in a row, before stopping.
        verbose: Log every improvement too; the reason for stopping is always logged.
        mode: "min" when smaller is better, "max" when larger is.
        strict: Raise when `monitor` does not exist; otherwise warn once.
        check_finite: Stop at once when the metric is NaN or infinite.
        stopping_threshold: Stop at once when the metric is better than this.
        divergence_threshold: Stop at once when the metric is worse than this.
        check_on_train_epoch_end: True checks after each training epoch, False after each validation. None: after
            validation, unless the run has none or the metric is one that training logs.

    Attributes:
        best_score: The best value seen (0-dim tensor).
        wait_count: Checks since then.
        stopped_epoch: The epoch (from 0) in which this callback asked to stop; 0 if it did not.
        stopping_reason: Why it did; `StopReason.NONE` if it did not.

    Raises:
        ConfigurationError: `mode` or `patience` is not allowed, or (when checking, if strict) the metric is missing.
    """

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        *,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigurationError(f"EarlyStopping(mode={mode!r}): allowed are 'min' and 'max'")
        if patience < 0:
            raise ConfigurationError(f"EarlyStopping(patience={patience}): must be 0 or more checks")
        self.monitor, self.mode, self.verbose, self.strict = monitor, mode, verbose, strict
        self.rules = StoppingRules(
            mode, abs(min_delta), patience, check_finite, stopping_threshold, divergence_threshold
        )
        wish = None
        if check_on_train_epoch_end is not None:
            wish = Moment.TRAIN_EPOCH if check_on_train_epoch_end else Moment.VALIDATION
        self._moment = MonitorMoment(wish)
        self._warned = False
        self._judged = -1  # batch of the value that was checked last
        self._asked: list[float] | None = None  # by what it asked to stop: the value; best value, checks since then
        self._resumes = False
        self.best_score = torch.tensor(worst_score(mode))
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopping_reason = StopReason.NONE

    @property
    def patience(self) -> int:
        """Checks without improvement before stopping."""
        return self.rules.patience

    @property
    def state_key(self) -> str:
        """Names the metric too, so that several of these can be used side by side."""
        return f"EarlyStopping(monitor={self.monitor!r}, mode={self.mode!r})"

    def setup(self, trainer: RunningTrainer, module: Module, stage: str) -> None:
        """Find out afresh when to check."""
        if stage == "fit":
            self._moment.begin()

    def on_fit_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Ask again for the stop that the run goes on from, if there is still reason to."""
        asked, resumes, self._resumes = self._asked, self._resumes, False
        if asked is None or not resumes or not self._active(trainer):
            return
        value, best, waited = asked
        verdict = judge(self.rules, StoppingState(best, int(waited)), value, self.monitor)
        if verdict.stop:
            self.stopping_reason = verdict.reason
            trainer.should_stop = True
            _log.info("EarlyStopping had asked the run that goes on here to stop, and still does: %s", verdict.message)

    def on_validation_start(self, trainer: RunningTrainer, module: Module) -> None:
        """See whether training logs the metric."""
        if self._active(trainer):
            self._moment.before_validation(self._logged_by(trainer, "train"))

    def on_validation_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Check, if this is the moment to."""
        if self._active(trainer) and self._moment.after_validation(self._logged_by(trainer, "validate")):
            self._check(trainer)

    def on_train_epoch_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Check, if this is the moment to."""
        if not self._active(trainer):
            return
        has_validation = any(count != 0 for count in trainer.num_val_batches)
        if self._moment.after_train_epoch(self._logged_by(trainer, "train"), has_validation):
            can_still_come = has_validation and not self._moment.validated
            if self.monitor in trainer.callback_metrics or not can_still_come:
                self._check(trainer)

    def teardown(self, trainer: RunningTrainer, module: Module, stage: str) -> None:
        """The next run counts anew."""
        if stage == "fit":
            self._judged, self._asked, self._resumes = -1, None, False

    def state_dict(self) -> dict[str, Any]:
        """Best value and counters."""
        return {
            "best_score": self.best_score.item(),
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "patience": self.patience,
            "judged": self._judged,
            "asked": self._asked,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there; `patience` stays what this object was made with."""
        self.best_score = torch.as_tensor(state_dict["best_score"], dtype=torch.float64)
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self._judged = state_dict.get("judged", -1)
        self._asked = state_dict.get("asked")
        self._resumes = True

    def _active(self, trainer: RunningTrainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run

    def _logged_by(self, trainer: RunningTrainer, stage: str) -> bool:
        """Whether the metric is there, and what logged it last was this."""
        when = trainer.metric_time(self.monitor)
        return self.monitor in trainer.callback_metrics and (when is None or when.stage == stage)

    def _check(self, trainer: RunningTrainer) -> None:
        if self.monitor not in trainer.callback_metrics:
            self._complain(trainer)
            return
        when = trainer.metric_time(self.monitor)
        if when is not None:
            if when.batch <= self._judged:
                return
            self._judged = when.batch
        value = float(trainer.callback_metrics[self.monitor])
        before = StoppingState(float(self.best_score), self.wait_count)
        verdict = judge(self.rules, before, value, self.monitor)
        self.wait_count = verdict.state.wait_count
        if verdict.state.best != before.best:
            # float64 holds what the check compared, so that a resumed run decides alike
            self.best_score = torch.tensor(verdict.state.best, dtype=torch.float64)
        if verdict.stop:
            self.stopped_epoch, self.stopping_reason = trainer.current_epoch, verdict.reason
            self._asked = [value, before.best, float(before.wait_count)]
            trainer.should_stop = True
            _log.info("EarlyStopping asks to stop in epoch %d: %s", trainer.current_epoch, verdict.message)
        elif self.verbose and verdict.message:
            _log.info("EarlyStopping: %s", verdict.message)

    def _complain(self, trainer: RunningTrainer) -> None:
        told = missing_metric(self.monitor, trainer.callback_metrics, any(trainer.num_val_batches))
        message = f"EarlyStopping(monitor={self.monitor!r}): {told}"
        if self.strict:
            raise ConfigurationError(message + "; strict=False makes this a warning")
        if not self._warned:
            _log.warning("%s", message)
            self._warned = True
