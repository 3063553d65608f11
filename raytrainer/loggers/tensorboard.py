"""Metrics and hyperparameters for TensorBoard."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrainer.extras import not_installed
from raytrainer.loggers.logger import DirectoryLogger, displayable, flatten
from raytrainer.loggers.media import as_images, as_values

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger(DirectoryLogger):
    """Writes TensorBoard event files to `<save_dir>/<name>/version_<n>`, through tensorboardX.

    Args:
        save_dir: A local folder.
        name: Name of the experiment.
        version: Number or label. None: the next free number.
        default_hp_metric: Write a metric "hp_metric" of -1 beside the hyperparameters, for TensorBoards that
            list hyperparameters only where a metric is named with them. Others show all scalars of the run there.
        prefix: Put before every metric's name, with a "-".

    Raises:
        ConfigurationError: tensorboardX is not installed, or `save_dir` is a URI.
    """

    def __init__(
        self,
        save_dir: str | Path,
        name: str = "logs",
        version: int | str | None = None,
        default_hp_metric: bool = False,
        prefix: str = "",
    ) -> None:
        super().__init__(save_dir, name, version)
        _tensorboardx()
        self._default_hp_metric = default_hp_metric
        self._prefix = f"{prefix}-" if prefix else ""
        self._writer: SummaryWriter | None = None
        self._opened = 0
        self._step = 0
        self._written: tuple[dict[str, Any], dict[str, float]] | None = None

    @property
    def experiment(self) -> SummaryWriter:
        """The tensorboardX SummaryWriter, for what else it can do. Opened anew after `finalize`, and after a failure.

        Raises:
            OSError: What was given to it before could not be written.
        """
        self._raise_failure()
        if self._writer is None:
            # tensorboardX names files by the second: without a suffix a writer opened soon after another,
            # in this process or elsewhere, would overwrite its file.
            suffix = f".{os.getpid()}.{self._opened}"
            self._opened += 1
            self._writer = _tensorboardx().SummaryWriter(logdir=self.log_dir, filename_suffix=suffix)
        files = self._writer.all_writers  # None: somebody has closed it
        if files is not None and not isinstance(files, _WatchedFiles):
            self._writer.all_writers = _WatchedFiles(files)
        return self._writer

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars; a mapping as a value gives several curves in one chart."""
        self._step = self._step if step is None else step
        writer = self.experiment
        for name, value in metrics.items():
            if isinstance(value, Mapping):
                writer.add_scalars(self._prefix + name, dict(value), self._step)
            else:
                writer.add_scalar(self._prefix + name, float(value), self._step)

    def log_hyperparams(self, params: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Write hyperparameters, nested ones as "outer/inner".

        `metrics` are the columns beside them in TensorBoard's HPARAMS table; without, every scalar of the run is one.
        """
        if metrics is None:
            metrics = {"hp_metric": -1.0} if self._default_hp_metric else {}
        values = {name: displayable(value) for name, value in flatten(params).items()}
        if self._written == (values, dict(metrics)):
            return  # a second fit: writing hp_metric's placeholder again would hide what was logged since
        self._written = values, dict(metrics)
        from tensorboardX.summary import hparams

        file_writer = self.experiment.file_writer
        assert file_writer is not None
        experiment, *session = hparams(values, dict(metrics))
        # where no run says what the experiment's metrics are, TensorBoard finds them in the scalars
        for summary in [experiment, *session] if metrics else session:
            file_writer.add_summary(summary)
        for name, value in metrics.items():
            self.experiment.add_scalar(name, float(value), 0)

    def log_image(self, key: str, images: Any, step: int | None = None, caption: Any = None) -> None:
        """Write pictures; several are "key/0", "key/1", ... TensorBoard shows no captions."""
        step = self._step if step is None else step
        arrays = as_images(images)
        for index, array in enumerate(arrays):
            name = key if len(arrays) == 1 else f"{key}/{index}"
            self.experiment.add_image(self._prefix + name, array, step, dataformats="HWC")

    def log_histogram(self, key: str, values: Any, step: int | None = None) -> None:
        """Write a histogram."""
        self.experiment.add_histogram(self._prefix + key, as_values(values), self._step if step is None else step)

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        """Write a text, in Markdown."""
        self.experiment.add_text(self._prefix + key, text, self._step if step is None else step)

    def save(self) -> None:
        """Flush the event file."""
        if self._writer is not None:
            self._writer.flush()
            self._raise_failure()

    def finalize(self, status: str) -> None:
        """Close the event file; the next call opens another in the same folder."""
        if self._writer is not None:
            watched = self._watched()
            try:
                self._writer.close()
            finally:
                self._writer = None
            _raise_first(watched)

    def _raise_failure(self) -> None:
        """If something could not be written, give up that file, whose end may be cut off, and raise the reason."""
        writer, watched = self._writer, self._watched()
        if writer is not None and any(each.error for each in watched):
            self._writer = None
            with contextlib.suppress(Exception):
                writer.close()
            _raise_first(watched)

    def _watched(self) -> list[_Watched]:
        files = None if self._writer is None else self._writer.all_writers
        return files.watched if isinstance(files, _WatchedFiles) else []

    def __getstate__(self) -> dict[str, Any]:
        # A SummaryWriter holds a thread and a file; a copy opens its own.
        return {**self.__dict__, "_writer": None, "_opened": time.time_ns()}


class _Watched:
    """What writes one event file, in a thread of tensorboardX's, and keeps the first error.

    The thread would end with it; then its queue, of ten events, fills up, and who logs waits for ever.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.error: Exception | None = None

    def _do(self, method: str, *args: Any) -> None:
        if self.error is None or method == "close":
            try:
                getattr(self._writer, method)(*args)
            except Exception as error:
                self.error = self.error or error

    def write_event(self, event: Any) -> None:
        self._do("write_event", event)

    def flush(self) -> None:
        self._do("flush")

    def close(self) -> None:
        self._do("close")


class _WatchedFiles(dict[str, Any]):
    """In the place of the dict of a SummaryWriter's files: each is watched from the moment that it is put there.

    That is before it is given its first event, also where it is one of a chart of several curves.
    """

    def __init__(self, files: Mapping[str, Any]) -> None:
        super().__init__()
        self.watched: list[_Watched] = []
        for name, file in files.items():
            self[name] = file

    def __setitem__(self, name: str, file: Any) -> None:
        events: Any = getattr(file, "event_writer", None)
        thread, target = getattr(events, "_worker", None), getattr(events, "_ev_writer", None)
        if thread is not None and hasattr(thread, "_record_writer"):  # else it is another release
            thread._record_writer = events._ev_writer = watched = _Watched(target)
            self.watched.append(watched)
        super().__setitem__(name, file)


def _raise_first(watched: list[_Watched]) -> None:
    for each in watched:
        if each.error is not None:
            raise each.error


def _tensorboardx() -> Any:
    try:
        import tensorboardX
    except ModuleNotFoundError as error:
        raise not_installed("TensorBoardLogger", "tensorboardX", "tensorboard", "use CSVLogger") from error
    return tensorboardX
