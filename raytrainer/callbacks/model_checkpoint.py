"""Save checkpoints while training, and keep the best of them."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from raytrainer.callbacks.callback import Callback
from raytrainer.checkpointing.places import is_link, same_place
from raytrainer.checkpointing.reservations import release, require_writable, reserve
from raytrainer.errors import CheckpointError, ConfigurationError
from raytrainer.plan.argument_checks import choice
from raytrainer.plan.missing_metric import missing_metric
from raytrainer.plan.monitoring import Moment, MonitorMoment
from raytrainer.plan.retention import (
    best_path,
    check_arguments,
    comparable,
    fill_template,
    free_name,
    place,
    template_fields,
    worst_path,
)
from raytrainer.plan.uris import absolute_or_uri, is_inside, join_path

if TYPE_CHECKING:
    from raytrainer.callbacks.running_trainer import RunningTrainer
    from raytrainer.messages import TrainReport
    from raytrainer.module import Module
    from raytrainer.plan.settings import Settings

__all__ = ["ModelCheckpoint"]

_log = logging.getLogger("raytrainer")

#: What may be monitored, and stand in file names, without being logged.
_COUNTERS = ("epoch", "step")


class ModelCheckpoint(Callback):
    """Saves checkpoints (directories ending in ".ckpt") at regular moments, and removes those that are no longer best.

    Args:
        dirpath: Folder or URI ("s3://bucket/x"). None: `checkpoints` in `trainer.log_dir`, or without a logger in
            `trainer.default_root_dir`.
        filename: Template such as "{epoch}-{val_loss:.2f}", which gives "epoch=3-val_loss=0.31". It may use "epoch",
            "step" and every name in `trainer.callback_metrics`. None: "{epoch}-{step}".
        monitor: Metric that says which checkpoints are best; "step" and "epoch" are always there. None: the latest is.
            A checkpoint waits for a value that is new and its own: of a validation metric, that of a validation of the
            very weights that are saved.
        mode: "min" when smaller is better, "max" when larger is.
        save_top_k: How many to keep: 0 none, -1 all; without `monitor` only 0, 1 and -1.
        save_last: True keeps "last.ckpt" too, written at every moment that a checkpoint could be, and at the end.
            "link" does the same: every checkpoint is whole.
        every_n_epochs: Save after every so many epochs [1]; 0 turns this off.
        every_n_train_steps: Instead, save whenever so many more optimizer steps are reached or passed.
        train_time_interval: Instead, save when so much time has passed since the last save or the start of training.
        save_on_train_epoch_end: True: after training epochs. False: after validations. None: after validations, unless
            the run has none or training logs the monitored metric. In each case, what an epoch's end asks for is saved
            once that is over: validation, hooks, schedulers and other callbacks.
        save_weights_only: Leave out what only resuming needs (optimizers, schedulers, counters).
        auto_insert_metric_name: Put "name=" before each value in `filename`; a "/" in a name becomes "_".
        save_on_exception: When the run fails, save what can be had of its state, under the name that is due (and as
            "last.ckpt", with `save_last`). It takes no part in what is best, and is not removed.
        enable_version_counter: Add "-v1" and so on to a name that is taken; False replaces the checkpoint there.
        on_error: What to do about a checkpoint that cannot be written, because the disk is full, say, or deleted:
            "raise" ends the run; "warn" says so and trains on, with the checkpoints that there are.
        verbose: Log every save.

    Attributes:
        best_model_path: The best checkpoint, without `monitor` the latest; "" before the first.
        best_model_score: Its score (0-dim tensor), None without `monitor`.
        best_k_models: Score of every kept checkpoint, by path; empty without `monitor`.
        kth_best_model_path: The worst of those kept, once `save_top_k` are.
        last_model_path: Where "last.ckpt" was written, or "".
        current_score: The score at the last look (0-dim tensor), or None.

    Raises:
        ConfigurationError: Arguments that are out of range or contradict each other; a folder that cannot be written
            to (before training); a monitored metric that nobody logs (when it is first needed and can no longer come).
    """

    runs_last: ClassVar[bool] = True

    #: The name of what `save_last` keeps; may be a template, as `filename`.
    CHECKPOINT_NAME_LAST = "last"

    #: What the names of checkpoints end in.
    FILE_EXTENSION = ".ckpt"

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool | str | None = None,
        every_n_epochs: int | None = None,
        *,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_weights_only: bool = False,
        auto_insert_metric_name: bool = True,
        save_on_exception: bool = False,
        enable_version_counter: bool = True,
        on_error: str = "raise",
        verbose: bool = False,
    ) -> None:
        self.on_error = choice("ModelCheckpoint(on_error)", on_error, ("raise", "warn"))
        check_arguments(filename, monitor, mode, save_top_k, every_n_epochs, every_n_train_steps, train_time_interval)
        self.dirpath = None if dirpath is None else absolute_or_uri(dirpath)
        self.filename = filename or "{epoch}-{step}"
        self.monitor, self.mode, self.save_top_k = monitor, mode, save_top_k
        self.save_last, self.save_weights_only, self.verbose = save_last, save_weights_only, verbose
        if save_last not in (None, True, False, "link"):
            raise ConfigurationError(f'ModelCheckpoint(save_last={save_last!r}): give True, False or "link".')
        self.save_on_exception, self.enable_version_counter = save_on_exception, enable_version_counter
        self.auto_insert_metric_name = auto_insert_metric_name
        self.every_n_train_steps = every_n_train_steps or None
        self.train_time_interval = train_time_interval
        by_default = 0 if self.every_n_train_steps or train_time_interval else 1
        self._timed = 0.0
        self.every_n_epochs = by_default if every_n_epochs is None else every_n_epochs
        self._wish: Moment | None = None
        if save_on_train_epoch_end is not None:
            self._wish = Moment.TRAIN_EPOCH if save_on_train_epoch_end else Moment.VALIDATION
        self._moment = MonitorMoment(self._wish)
        self.best_model_path = ""
        self.best_model_score: torch.Tensor | None = None
        self.best_k_models: dict[str, torch.Tensor] = {}
        self.kth_best_model_path = ""
        self.last_model_path = ""
        self.current_score: torch.Tensor | None = None
        self._saved_step = self._last_saved_step = 0
        self._due = False  # it is time to save, and the moment or the metric is still to come
        self._judged = -1  # batch of the metric's value that was acted on last
        self._warned: set[str] = set()
        self._pending: dict[str, Any] | None = None
        self._failed: deque[Callable[[], None]] = deque()  # what has to be taken back, from the writer's thread

    @property
    def state_key(self) -> str:
        """Names what tells several of these apart."""
        return (
            f"ModelCheckpoint(monitor={self.monitor!r}, mode={self.mode!r}, filename={self.filename!r}, "
            f"every_n_train_steps={self.every_n_train_steps}, every_n_epochs={self.every_n_epochs}"
            + (f", train_time_interval={self.train_time_interval})" if self.train_time_interval else ")")
        )

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is to be expected: with `save_top_k=0` only the last, or a failure's, if asked for."""
        at_times = bool(self.every_n_epochs or self.every_n_train_steps or self.train_time_interval)
        return bool((self.save_top_k != 0 and at_times) or self.save_last or self.save_on_exception)

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint of this run, or of the one that it went on from; 0: there is none."""
        return max(self._saved_step, self._last_saved_step)

    # When

    def setup(self, trainer: RunningTrainer, module: Module, stage: str) -> None:
        """Settle the folder, and find out afresh when to save."""
        if stage != "fit":
            return
        self._moment.begin()
        if "://" not in self._folder(trainer) and self._active(trainer):
            self.require_writable()

    def on_train_start(self, trainer: RunningTrainer, module: Module) -> None:
        """What a resumed run starts from has been saved already."""
        self._saved_step = self._last_saved_step = trainer.global_step
        self._timed = time.monotonic()
        self._due = False

    def on_validation_start(self, trainer: RunningTrainer, module: Module) -> None:
        """See whether training logs the monitored metric."""
        if self._active(trainer):
            self._moment.before_validation(self._logged_by(trainer, "train"))

    def on_validation_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Save, if this is the moment to."""
        if self._active(trainer):
            now = self._moment.after_validation(self._is_free(trainer) or self._logged_by(trainer, "validate"))
            self._due |= now and self._epoch_due(trainer)
            if not trainer.epoch_ended:
                self._save_if_due(trainer)

    def on_train_chunk_end(self, trainer: RunningTrainer, module: Module, report: TrainReport) -> None:
        """Save at the steps asked for, or when the time has come; but first comes what ends an epoch, or validates."""
        if not self._active(trainer):
            return
        interval, now = self.train_time_interval, time.monotonic()
        if interval and now - self._timed >= interval.total_seconds():
            self._timed, self._due = now, True
        every, step = self.every_n_train_steps, trainer.global_step
        self._due |= bool(every and step // every > (step - report.steps) // every)
        if not trainer.epoch_ended and not trainer.about_to_validate:
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Save, if this is the moment to; say so if the monitored metric will never come."""
        if not self._active(trainer):
            return
        has_validation = any(count != 0 for count in trainer.num_val_batches)
        now = self._moment.after_train_epoch(self._logged_by(trainer, "train"), has_validation)
        now |= self._is_free(trainer) and self._wish is None and _each_epoch_validates(trainer.settings)
        can_still_come = has_validation and not self._moment.validated
        if not self._has_metric(trainer) and self.save_top_k != 0 and not can_still_come:
            raise ConfigurationError(self._missing(trainer))
        self._due |= now and self._epoch_due(trainer)
        self._save_if_due(trainer)

    def on_train_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Save what an interrupted epoch's end was to save; bring "last.ckpt" up to date with the end of training."""
        if not self._active(trainer):
            return
        self._save_if_due(trainer)
        if self.save_last and trainer.global_step != self._last_saved_step:
            self._save_as_last(trainer)

    def on_exception(self, trainer: RunningTrainer, module: Module, exception: BaseException) -> None:
        """Save what there is, if asked to. If that fails too, say so, and leave the first exception to be raised."""
        if not self.save_on_exception or not self._active(trainer) or not trainer.state.has_begun:
            return
        if trainer.preempted and trainer.preemption_grace != 0:
            return  # it has been saved, or there has been no time
        paths = [self._new_path(trainer, None)] + ([self._last_path(trainer)] if self.save_last else [])
        for path in paths:
            try:
                trainer.save_checkpoint(path, weights_only=self.save_weights_only)
            except Exception as error:
                _log.warning("ModelCheckpoint could not save %s: %s", path, error)
            else:
                _log.info("Saved %s after %s.", path, type(exception).__name__)

    @staticmethod
    def default_folder(log_dir: str) -> str:
        """Where checkpoints go if there is no `dirpath`."""
        return absolute_or_uri(join_path(str(log_dir), "checkpoints"))

    def _active(self, trainer: RunningTrainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run

    def _epoch_due(self, trainer: RunningTrainer) -> bool:
        return self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _has_metric(self, trainer: RunningTrainer) -> bool:
        return self.monitor is None or self.monitor in self._candidates(trainer)

    def _candidates(self, trainer: RunningTrainer) -> dict[str, float]:
        """What may be monitored and stand in file names."""
        there = {name: value.item() for name, value in trainer.callback_metrics.items()}
        counters = dict(zip(_COUNTERS, (trainer.current_epoch, trainer.global_step), strict=True))
        return there | {name: int(there.get(name, count)) for name, count in counters.items()}

    def _is_free(self, trainer: RunningTrainer) -> bool:
        """Whether nothing is monitored that has to be logged first: no metric, or a counter."""
        return self.monitor is None or (self.monitor in _COUNTERS and self.monitor not in trainer.callback_metrics)

    def _logged_by(self, trainer: RunningTrainer, stage: str) -> bool:
        """Whether the monitored metric is there, and what logged it last was this."""
        if self.monitor is None or self.monitor not in trainer.callback_metrics:
            return False
        when = trainer.metric_time(self.monitor)
        return when is None or when.stage == stage

    def _is_judged(self, trainer: RunningTrainer) -> bool:
        """Whether the monitored metric has a value that is new, and tells of the weights that there are now."""
        if self.monitor is None or self.save_top_k == 0:
            return True
        when = trainer.metric_time(self.monitor)
        if when is None:
            return self._has_metric(trainer)
        if when.stage == "train":
            return when.batch > self._judged
        return when.batch == trainer.total_batches

    def _missing(self, trainer: RunningTrainer) -> str:
        told = missing_metric(str(self.monitor), trainer.callback_metrics, any(trainer.num_val_batches))
        return f"ModelCheckpoint(monitor={self.monitor!r}): {told}"

    # What

    def _save_if_due(self, trainer: RunningTrainer) -> None:
        self._take_back()
        if not self._due or not self._is_judged(trainer):
            return
        self._due = False
        if self._saved_step != trainer.global_step:
            self._save_best(trainer)
        if self.save_last and self._last_saved_step != trainer.global_step:
            self._save_as_last(trainer)

    def _take_back(self) -> None:
        """Forget what could not be written since the last time."""
        while self._failed:
            self._failed.popleft()()

    def teardown(self, trainer: RunningTrainer, module: Module, stage: str) -> None:
        """Name only checkpoints that are there; the next run counts anew."""
        self._take_back()
        if stage == "fit":
            self._due, self._judged = False, -1

    def _save_best(self, trainer: RunningTrainer) -> None:
        if self.save_top_k == 0:
            return
        if self.monitor is None:
            drop = self.best_model_path if self.save_top_k == 1 else ""
            self._write(trainer, drop or None, None)
            return
        score = comparable(float(self._candidates(trainer)[self.monitor]), self.mode)
        self.current_score = torch.tensor(score, dtype=torch.float64)
        placement = place(self._scores(), score, self.save_top_k, self.mode)
        if placement.save:
            self._write(trainer, placement.drop, score)
        elif self.verbose:
            _log.info("step %d: %s = %.6g is not among the best", trainer.global_step, self.monitor, score)
        when = trainer.metric_time(self.monitor)
        self._judged = -1 if when is None else when.batch

    def _write(self, trainer: RunningTrainer, drop: str | None, score: float | None) -> None:
        path = self._new_path(trainer, drop)
        before = self._record()
        # Recorded first, because the checkpoint itself contains this record.
        self._saved_step, self.best_model_path = trainer.global_step, path
        if score is not None:
            if drop is not None:
                del self.best_k_models[drop]
            self.best_k_models[path] = torch.tensor(score, dtype=torch.float64)
            self._rank()

        def take_back() -> None:
            kept = before["best_k_models"]
            if path != drop:
                self.best_k_models.pop(path, None)
            if drop is not None and drop in kept:
                self.best_k_models[drop] = kept[drop]
            if score is not None:
                self._rank()
            elif self.best_model_path == path:
                self.best_model_path = before["best_model_path"]

        self._save_or_restore(trainer, path, before, take_back)
        if self.verbose:
            _log.info("epoch %d, step %d: saved %s", trainer.current_epoch, trainer.global_step, path)
        if drop is not None and drop != path and self._may_remove(trainer, drop):
            self._remove(trainer, drop)

    def _save_as_last(self, trainer: RunningTrainer) -> None:
        path, previous = self._last_path(trainer), self.last_model_path
        before = self._record()
        self.last_model_path, self._last_saved_step = path, trainer.global_step

        def take_back() -> None:
            if self.last_model_path == path:
                self.last_model_path = before["last_model_path"]

        self._save_or_restore(trainer, path, before, take_back)
        if previous not in ("", path) and self._may_remove(trainer, previous):
            self._remove(trainer, previous)

    def _last_path(self, trainer: RunningTrainer) -> str:
        folder = self._folder(trainer)
        stem = fill_template(self.CHECKPOINT_NAME_LAST, self._candidates(trainer), self.auto_insert_metric_name)

        def taken(name: str) -> bool:
            path = join_path(folder, name)
            if path == self.last_model_path:
                return is_link(path)  # what somebody has put in its place is not ours to write over
            return trainer.checkpoint_exists(path) or not reserve(path)

        return join_path(folder, self._free_name(stem, taken))

    def _free_name(self, stem: str, taken: Callable[[str], bool]) -> str:
        if not self.enable_version_counter:
            return stem + self.FILE_EXTENSION
        return free_name(stem, self.FILE_EXTENSION, taken)

    def _rank(self) -> None:
        scores = self._scores()
        self.best_model_path = best_path(scores, self.mode) or ""
        self.best_model_score = self.best_k_models.get(self.best_model_path)
        full = len(scores) == self.save_top_k or self.save_top_k == -1
        self.kth_best_model_path = (worst_path(scores, self.mode) or "") if full else ""

    def _scores(self) -> dict[str, float]:
        return {path: float(score) for path, score in self.best_k_models.items()}

    # Where

    def _folder(self, trainer: RunningTrainer) -> str:
        if self.dirpath is None:
            self.dirpath = self.default_folder(trainer.log_dir or trainer.default_root_dir)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            if pending.get("dirpath") == self.dirpath:  # otherwise each version has a folder of its own
                self.load_state_dict(pending)
        return self.dirpath

    def _new_path(self, trainer: RunningTrainer, drop: str | None) -> str:
        values = self._candidates(trainer)
        unknown = sorted(set(template_fields(self.filename)) - set(values))
        if unknown:
            self._warn_once(f"ModelCheckpoint(filename={self.filename!r}): not logged, taken as 0: {unknown}")
        stem = fill_template(self.filename, values, self.auto_insert_metric_name)
        folder = self._folder(trainer)

        def taken(name: str) -> bool:
            path = join_path(folder, name)
            # The one that has to go may be overwritten: a fixed filename then stays one checkpoint.
            new = path not in self.best_k_models and not trainer.checkpoint_exists(path)
            return is_link(path) if path == drop else not (new and reserve(path))

        return join_path(folder, self._free_name(stem, taken))

    def require_writable(self) -> None:
        """Find out whether the folder, if it is known by now, can be written to; see `Raises` above."""
        if self.dirpath is not None and self.saves:
            require_writable(self.dirpath, "ModelCheckpoint")

    def _remove(self, trainer: RunningTrainer, path: str) -> None:
        def failed(error: CheckpointError) -> None:
            _log.warning("ModelCheckpoint: training goes on, with a checkpoint more: %s", error)

        options: dict[str, Any] = {"on_error": failed} if self.on_error == "warn" else {}
        trainer.remove_checkpoint(path, **options)

    def _may_remove(self, trainer: RunningTrainer, path: str) -> bool:
        resumed_from = trainer.ckpt_path
        if resumed_from is not None and same_place(str(resumed_from), path):
            return False
        return is_inside(path, self._folder(trainer))

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _log.warning("%s", message)

    # State

    def _record(self) -> dict[str, Any]:
        names = ("best_model_path", "best_model_score", "kth_best_model_path", "last_model_path")
        steps = ("_saved_step", "_last_saved_step")
        return {"best_k_models": dict(self.best_k_models), **{name: getattr(self, name) for name in names + steps}}

    def _save_or_restore(
        self, trainer: RunningTrainer, path: str, record: dict[str, Any], take_back: Callable[[], None]
    ) -> None:
        def failed(error: CheckpointError) -> None:
            _log.warning("ModelCheckpoint: training goes on without a checkpoint: %s", error)
            self._failed.append(take_back)

        options: dict[str, Any] = {"on_error": failed} if self.on_error == "warn" else {}
        try:
            trainer.save_checkpoint(path, weights_only=self.save_weights_only, **options)
        except BaseException:
            release(path)
            for name, value in record.items():
                setattr(self, name, value)
            raise

    def state_dict(self) -> dict[str, Any]:
        """Paths and scores, as plain values."""
        self._take_back()
        return {
            "dirpath": self.dirpath,
            "monitor": self.monitor,
            "best_model_path": self.best_model_path,
            "best_model_score": None if self.best_model_score is None else float(self.best_model_score),
            "best_k_models": self._scores(),
            "current_score": None if self.current_score is None else float(self.current_score),
            "last_model_path": self.last_model_path,
            "judged": self._judged,
            "due": self._due,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was kept, if it lies in this object's folder; otherwise begin anew, with a warning."""
        self._judged, self._due = state_dict.get("judged", -1), state_dict.get("due", False)
        if self.dirpath is None:
            self._pending = state_dict  # the folder is only known once there is a trainer
            return
        if state_dict.get("dirpath") != self.dirpath:
            self._warn_once(
                f"ModelCheckpoint: the folder changed from {state_dict.get('dirpath')} to {self.dirpath}; "
                "checkpoints in the old one are left alone and no longer count as best"
            )
            return
        self.last_model_path = state_dict.get("last_model_path", "")
        self.best_model_path = state_dict.get("best_model_path", "")
        self.best_model_score = _tensor(state_dict.get("best_model_score"))
        self.current_score = _tensor(state_dict.get("current_score"))
        scores: dict[str, float] = state_dict.get("best_k_models", {})
        self.best_k_models = {path: torch.tensor(score, dtype=torch.float64) for path, score in scores.items()}
        if scores:
            self._rank()


def _each_epoch_validates(settings: Settings) -> bool:
    """Whether each epoch ends in a validation, unless it is cut short, and has no other."""
    return settings.check_val_every_n_epoch == 1 and settings.val_check_interval == 1.0


def _tensor(value: float | None) -> torch.Tensor | None:
    return None if value is None else torch.tensor(value, dtype=torch.float64)
