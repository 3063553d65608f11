"""`self.logger` in a worker: calls are kept, and made on the driver's loggers with the next report."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from raytrainer.data.transfer import map_leaves
from raytrainer.errors import SerializationError
from raytrainer.loggers.logger import Logger
from raytrainer.loggers.media import draw
from raytrainer.metric_messages import LogCall
from raytrainer.plan.errors_of_others import says_loader_died
from raytrainer.view.trainer_view import TrainerView

__all__ = ["TRANSFER_HOOKS", "Evaluates", "Recorder", "Trains", "WorkerLogger"]

log = logging.getLogger("raytrainer")

#: Hooks of a whole run, which a recovered run calls again in the same order: what they log counts once.
_ONCE = (None, "setup", "on_fit_start", "on_train_start")
#: Hooks of a batch about to begin, in the order in which they are called.
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
#: Methods whose `step` is filled in.
_STEPPED = frozenset(["log_figure", "log_histogram", "log_image", "log_metrics", "log_text"])


class Trains(Protocol):
    """A loop that trains; `batch` counts what it has done of the epoch."""

    batch: int


class Evaluates(Protocol):
    """An evaluation; `done` counts its batches."""

    done: int


class Recorder:
    """Keeps the calls of one worker's `self.logger` until they are fetched.

    Args:
        view: The run.
        stepped: Tells how many batches of training have ended in a step.
        keeps: Whether calls are wanted: of rank 0 only, and where there are loggers.

    Attributes:
        training: The loop that trains, once there is one.
        evaluation: The evaluation that runs.
    """

    def __init__(self, view: TrainerView, stepped: Callable[[], int], keeps: bool) -> None:
        self.view, self._stepped, self.keeps = view, stepped, keeps
        self.training: Trains | None = None
        self.evaluation: Evaluates | None = None
        self._calls: list[LogCall] = []
        self._once: Counter[str | None] = Counter()  # calls of hooks that have no place among the batches

    def record(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a call. Tensors are copied where they are, without waiting for their device."""
        if not self.keeps or self.view.running == "sanity":
            return
        hook, step = self.view.metrics.hook, None
        if name in _STEPPED and self.view.stage == "fit":
            begun = self.view.metrics.batch is not None or hook in TRANSFER_HOOKS
            in_batch = self.view.running == "train" and begun
            # between batches: the step of the batch just done, as for epoch values
            step = self._stepped() if in_batch else max(0, self._stepped() - 1)
        args, kwargs = map_leaves((args, kwargs), _copied)
        place = self._position(hook)
        if hook in TRANSFER_HOOKS:  # training and evaluation have them in common, but not the order of their places
            hook = f"{self.view.running} {hook}"
        self._calls.append(LogCall(name, args, kwargs, hook, place, step))

    def _position(self, hook: str | None) -> tuple[int, ...]:
        if hook in _ONCE:
            self._once[hook] += 1
            return (self._once[hook],)
        if hook == "on_train_epoch_start":
            return (self.view.current_epoch,)
        batch = 0 if self.training is None else self.training.batch
        return (self._stepped(), batch, 0 if self.evaluation is None else self.evaluation.done)

    def take(self) -> list[LogCall]:
        """All calls since the last time, with tensors in main memory."""
        calls, self._calls = self._calls, []
        for index, call in enumerate(calls):
            args, kwargs = map_leaves((call.args, call.kwargs), _in_main_memory)
            calls[index] = LogCall(call.name, args, kwargs, call.hook, call.position, call.step)
        return calls


def _in_main_memory(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    """A leaf of a call's arguments as it is now: the caller may go on to change it.

    Raises:
        SerializationError: It cannot be sent to the driver.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if hasattr(value, "copy") and hasattr(value, "__array_interface__"):  # numpy's, and Pillow's images
        return value.copy()
    try:
        pickle.dumps(value)
    except Exception as error:
        if says_loader_died(error):
            raise
        raise SerializationError(
            f"self.logger was given a {type(value).__name__}, which cannot be sent to the driver ({error}); give "
            f"tensors, arrays, numbers, text, or figures to log_figure."
        ) from error
    return value


class WorkerLogger(Logger):
    """Stands for all loggers of the run in module code: `log_...` calls reach them with the next report.

    Calls of rank 0 count; on other ranks they do nothing. Any method whose name begins with "log_" may be called; those
    that only one kind of logger has reach the loggers that have them. Nothing is returned.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Give values to the loggers past `self.log`: as they are, from rank 0, at `step` [the current one]."""
        self._recorder.record("log_metrics", (dict(metrics),), {"step": step})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Give hyperparameters to the loggers, beside those of `save_hyperparameters`."""
        self._recorder.record("log_hyperparams", (params, *args), kwargs)

    def log_image(self, key: str, images: Any, step: int | None = None, caption: Any = None) -> None:
        """Log pictures."""
        self._recorder.record("log_image", (key, images), {"step": step, "caption": caption})

    def log_figure(self, key: str, figure: Any, step: int | None = None) -> None:
        """Log a matplotlib figure, which is drawn at once and may be closed then."""
        if self._recorder.keeps:
            self._recorder.record("log_figure", (key, draw(figure)), {"step": step})

    def log_histogram(self, key: str, values: Any, step: int | None = None) -> None:
        """Log the distribution of numbers."""
        self._recorder.record("log_histogram", (key, values), {"step": step})

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        """Log a text."""
        self._recorder.record("log_text", (key, text), {"step": step})

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("log_"):
            raise AttributeError(
                f"self.logger in a worker has no {name!r}: the loggers live on the driver, and only log_... methods "
                f"reach them. Use trainer.logger.{name} in a Callback."
            )
        return lambda *args, **kwargs: self._recorder.record(name, args, kwargs)

    def __getstate__(self) -> Any:
        raise SerializationError("self.logger belongs to a run and cannot be copied or sent: use self.logger anew.")
