"""`Logs`: what a run gives its loggers. A logger that fails is named once, and never ends the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from raytrainer.errors import ConfigurationError
from raytrainer.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from raytrainer.loggers.logger import DirectoryLogger
from raytrainer.metric_messages import LogCall
from raytrainer.plan.nearest_names import nearest
from raytrainer.plan.strangers import is_lightnings

__all__ = ["Logs", "make_loggers"]

log = logging.getLogger("raytrainer")

#: Those that a user may mean by a name.
KINDS = (CSVLogger, TensorBoardLogger, MLFlowLogger, WandbLogger)

#: A logger that fails is left alone for so many times as long as its failing took.
_REST = 10.0


def make_loggers(logger: Logger | Iterable[Logger] | bool | None, folder: str) -> list[Logger]:
    """The loggers that a Trainer's argument means; True is a `CSVLogger` in `folder`.

    Raises:
        ConfigurationError: One is no Logger.
    """
    if logger is None or logger is False:
        return []
    if logger is True:
        return [CSVLogger(folder, name="raytrainer_logs")]
    given = list(logger) if isinstance(logger, Iterable) and not isinstance(logger, (str, Logger)) else [logger]
    for item in given:
        if isinstance(item, type):
            raise ConfigurationError(f"logger={item.__name__}, a class: give an object, {item.__name__}(...).")
        if not isinstance(item, Logger):
            named = {kind.__name__.removesuffix("Logger").lower(): kind.__name__ for kind in KINDS}
            near = nearest(item, named) if isinstance(item, str) else []
            meant = f" Did you mean raytrainer.{named[near[0]]}(...)?" if near else ""
            if is_lightnings(item, "Logger"):
                ours = {kind.__name__ for kind in KINDS}
                name = type(item).__name__ if type(item).__name__ in ours else "Logger"
                meant = f" This one is Lightning's: {'take' if name in ours else 'derive it from'} raytrainer.{name}."
            raise ConfigurationError(
                f"logger={item!r}: give a Logger, such as raytrainer.CSVLogger({folder!r}) or "
                f"raytrainer.TensorBoardLogger({folder!r}), a list of them, True or False.{meant}"
            )
    return given


class Logs:
    """All loggers of one run.

    Args:
        loggers: Where everything goes, in this order.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)
        self._failed: set[int] = set()
        self._resting: dict[int, float] = {}  # until when a logger that has failed is left alone
        self._unheard: set[str] = set()
        self._seen: dict[str | None, tuple[int, ...]] = {}  # how far the calls of each hook have come

    def require_writable(self) -> None:
        """See to the folders of those that write files.

        Raises:
            ConfigurationError: One cannot be written to.
        """
        for logger in self.loggers:
            if isinstance(logger, DirectoryLogger):
                logger.require_writable()

    def each(self, method: str, *args: Any) -> None:
        """Call a method of every logger."""
        for logger in self.loggers:
            self._safely(logger, method, args, {})

    def finalize(self, status: str, around: Callable[[str], AbstractContextManager[None]]) -> None:
        """Call `finalize` of every logger, each inside what `around` makes of its name."""
        for logger in self.loggers:
            with around(f"{type(logger).__name__}.finalize"):
                self._safely(logger, "finalize", (status,), {})

    def rows(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Give rows (step, values) to every logger."""
        if rows:
            self.each("log_rows", rows)

    def replay(self, calls: Sequence[LogCall], step: int) -> None:
        """Make the calls of a worker's `self.logger`, leaving out what a recovered run repeats.

        Args:
            calls: In order.
            step: The step of those that have none.
        """
        fresh = [call for call in calls if call.hook not in self._seen or call.position > self._seen[call.hook]]
        for call in calls:
            self._seen[call.hook] = max(call.position, self._seen.get(call.hook, call.position))
        for call in fresh:
            kwargs = dict(call.kwargs)
            if "step" in kwargs and kwargs["step"] is None:
                kwargs["step"] = step if call.step is None else call.step
            heard = [logger for logger in self.loggers if self._safely(logger, "supports", (call.name,), {})]
            if not heard and call.name not in self._unheard:
                self._unheard.add(call.name)
                names = ", ".join(type(logger).__name__ for logger in self.loggers)
                log.warning("self.logger.%s(): none of the loggers (%s) stores that.", call.name, names)
            for logger in heard:
                self._safely(logger, call.name, call.args, kwargs)

    def _safely(self, logger: Logger, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a method of a logger returns; None where it fails."""
        began = time.perf_counter()
        if began < self._resting.get(id(logger), 0.0) and method != "finalize":
            return None
        try:
            return getattr(logger, method)(*args, **kwargs)
        except Exception as error:
            # a server that answers no more must not take a minute of each second
            ended = time.perf_counter()
            self._resting[id(logger)] = ended + _REST * (ended - began)
            if id(logger) in self._failed:
                return None
            self._failed.add(id(logger))
            name = type(logger).__name__
            log.warning(
                "%s failed, training goes on: %s: %s (in %s; said once a run)",
                name, type(error).__name__, error, method,
            )  # fmt: skip
