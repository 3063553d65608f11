"""When and what a run shows of its progress. How that is drawn, and how wide: `_progress_display` and `_notebook`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from raytrainer.callbacks.callback import Callback
from raytrainer.errors import ConfigurationError

if TYPE_CHECKING:
    from raytrainer.callbacks._progress_display import Display
    from raytrainer.callbacks.running_trainer import RunningTrainer
    from raytrainer.messages import EvaluationReport, TrainReport
    from raytrainer.module import Module

__all__ = ["ProgressBar"]


class ProgressBar(Callback):
    """Shows epochs, batches, speed and the metrics logged with `prog_bar=True`, on stdout, from the driver only.

    On a terminal, and in a notebook: a live bar for the epoch, and one that comes and goes for each evaluation. In a
    notebook that is one output of the cell, which stays and is saved with it, a line for each epoch. Elsewhere (a file,
    a batch job) plain lines: one at the end of each epoch or test, and one every 30 s within a long one.

    Args:
        refresh_rate: Seconds between redraws of live bars [0.5]. 0 shows nothing at all.
        leave: Keep each epoch's bar on the screen (True), or only the last (False). None: in a notebook those of the
            last 30 epochs, on a terminal only the last.
        metrics: Further metrics to show in training, of those that loggers are given: names, or patterns of names such
            as "gpu_memory/*".

    Raises:
        ConfigurationError: `refresh_rate` is negative, or `metrics` holds something else than names.
    """

    def __init__(self, refresh_rate: float = 0.5, leave: bool | None = None, metrics: str | Sequence[str] = ()) -> None:
        if refresh_rate < 0:
            raise ConfigurationError(f"ProgressBar(refresh_rate={refresh_rate}): seconds, above 0; 0 turns it off")
        self.refresh_rate, self.leave = refresh_rate, leave
        if isinstance(metrics, str):
            metrics = (metrics,)
        if not isinstance(metrics, Sequence) or not all(isinstance(name, str) for name in metrics):
            raise ConfigurationError(
                f"ProgressBar(metrics={metrics!r}): give names, or patterns such as 'gpu_memory/*'"
            )
        self.metrics = tuple(metrics)
        self._display: Display | None = None
        self._batch = self._evaluated = 0
        self._evaluating = False
        self._begun = False  # whether the epoch in progress has a bar

    def setup(self, trainer: RunningTrainer, module: Module, stage: str) -> None:
        """Choose how to show things, according to what stdout is now."""
        self._close()
        self._evaluating = self._begun = False
        if self.refresh_rate > 0:
            from raytrainer.callbacks._progress_display import make_display  # and rich, which workers do without

            self._display = make_display(self.refresh_rate, self.leave)

    def teardown(self, trainer: RunningTrainer, module: Module, stage: str) -> None:
        """Give the terminal back."""
        self._close()

    def on_exception(self, trainer: RunningTrainer, module: Module, exception: BaseException) -> None:
        """Give the terminal back, so that the error can be read."""
        self._close()

    def on_train_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Leave the last bar as it is."""
        self._close()

    def on_train_epoch_start(self, trainer: RunningTrainer, module: Module) -> None:
        """A new bar."""
        self._begin(trainer)

    def _begin(self, trainer: RunningTrainer) -> None:
        self._batch, self._begun = 0, True
        if self._display is not None:
            label = epoch_label(trainer.current_epoch, trainer.max_epochs)
            self._display.start("train", label, self._batches_to_come(trainer))

    def on_train_chunk_end(self, trainer: RunningTrainer, module: Module, report: TrainReport) -> None:
        """Move the bar."""
        if not self._begun:  # the epoch had begun before the run was resumed
            self._begin(trainer)
        self._batch = report.batch
        if self._display is not None:
            self._display.update("train", report.batch, self.get_metrics(trainer, module))

    def on_train_epoch_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Show the epoch's metrics."""
        if not self._begun:  # nothing but its end was left
            self._begin(trainer)
            self._batch = self._batches_to_come(trainer) or 0
        self._begun = False
        if self._display is not None:
            self._display.end("train", self._batch, self.get_metrics(trainer, module), say=True)

    def on_validation_start(self, trainer: RunningTrainer, module: Module) -> None:
        """A bar below the epoch's."""
        if trainer.sanity_checking:
            self._start_evaluation("Sanity check", trainer.num_sanity_val_batches)
        else:
            self._start_evaluation("Validation", trainer.num_val_batches)

    def on_validation_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Take the bar away; within a fit, the epoch's line shows the metrics."""
        self._end_evaluation(trainer, module, say=trainer.state.fn != "fit")

    def on_test_start(self, trainer: RunningTrainer, module: Module) -> None:
        """A bar."""
        self._start_evaluation("Test", trainer.num_test_batches)

    def on_test_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Take the bar away."""
        self._end_evaluation(trainer, module, say=True)

    def on_predict_start(self, trainer: RunningTrainer, module: Module) -> None:
        """A bar."""
        self._start_evaluation("Predict", trainer.num_predict_batches)

    def on_predict_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Take the bar away."""
        self._end_evaluation(trainer, module, say=True)

    def on_evaluation_chunk_end(self, trainer: RunningTrainer, module: Module, report: EvaluationReport) -> None:
        """Move the evaluation's bar."""
        self._evaluated = report.batches
        if self._display is not None:
            self._display.update("evaluation", report.batches, {})

    def get_metrics(self, trainer: RunningTrainer, module: Module) -> dict[str, Any]:
        """What to show beside a bar, by name: numbers or text. Override it to show something else.

        Here: metrics that were logged with `prog_bar=True`, and in training those asked for by `metrics`.
        """
        if not self.metrics or self._evaluating:
            return dict(trainer.progress_bar_metrics)
        logged = {name: value.item() for name, value in trainer.logged_metrics.items() if self._asked_for(name)}
        return {**trainer.progress_bar_metrics, **logged}

    def _asked_for(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.metrics)

    @staticmethod
    def _batches_to_come(trainer: RunningTrainer) -> int | None:
        """The epoch's batches, or fewer if `max_steps` ends it before; an epoch that is resumed shows them all."""
        batches, max_steps = trainer.num_training_batches, trainer.max_steps
        if max_steps is None or max_steps < 0 or trainer.ckpt_path is not None:
            return batches
        left = (max_steps - trainer.global_step) * trainer.settings.accumulated(trainer.current_epoch)
        return left if batches is None else min(batches, left)

    def _start_evaluation(self, label: str, batches: Sequence[int | None]) -> None:
        self._evaluated, self._evaluating = 0, True
        if self._display is not None:
            self._display.start("evaluation", label, add_up(batches))

    def _end_evaluation(self, trainer: RunningTrainer, module: Module, say: bool) -> None:
        if self._display is not None:
            metrics = self.get_metrics(trainer, module) if say else {}
            self._display.end("evaluation", self._evaluated, metrics, say=say)
        self._evaluating = False

    def _close(self) -> None:
        display, self._display = self._display, None
        if display is not None:
            display.close()


def epoch_label(epoch: int, max_epochs: int | None) -> str:
    """ "Epoch 2/8" for the third of nine; without a limit "Epoch 2".

    Counted from 0, as `current_epoch`, loggers, messages and checkpoints' names do, and Lightning's bars.
    """
    return f"Epoch {epoch}" + (f"/{max_epochs - 1}" if max_epochs is not None and max_epochs >= 1 else "")


def add_up(batches: Sequence[int | None]) -> int | None:
    """Batches of all loaders; None when one of them does not know."""
    known = [count for count in batches if count is not None]
    return sum(known) if len(known) == len(batches) else None
