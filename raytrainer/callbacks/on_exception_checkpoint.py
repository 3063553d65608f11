"""Save a checkpoint when training fails."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from raytrainer.callbacks.callback import Callback
from raytrainer.checkpointing.reservations import require_writable
from raytrainer.errors import ConfigurationError
from raytrainer.plan.uris import absolute_or_uri, join_path

if TYPE_CHECKING:
    from raytrainer.callbacks.running_trainer import RunningTrainer
    from raytrainer.module import Module

__all__ = ["OnExceptionCheckpoint"]

log = logging.getLogger("raytrainer")


class OnExceptionCheckpoint(Callback):
    """Saves `<dirpath>/<filename>.ckpt` when `fit` ends with an exception, to be resumed from by `ckpt_path`.

    In the driver's own process ("local") that is the state before the batch that failed, but for what that batch has
    changed itself, such as the generators. Of Ray workers, which may be gone or wait for each other for ever, it is the
    newest snapshot (see `Trainer(snapshot_every=...)`).

    Args:
        dirpath: Folder or URI.
        filename: Its name, without ".ckpt".

    Raises:
        ConfigurationError: An empty name; a folder that cannot be written to (before training).
    """

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        if not filename:
            raise ConfigurationError("OnExceptionCheckpoint(filename=''): give a name.")
        self.dirpath = absolute_or_uri(dirpath)
        self.filename = filename

    @property
    def ckpt_path(self) -> str:
        """Where the checkpoint goes."""
        return join_path(self.dirpath, f"{self.filename}.ckpt")

    def setup(self, trainer: RunningTrainer, module: Module, stage: str) -> None:
        """Find out in time whether the folder can be written to."""
        if stage == "fit":
            require_writable(self.dirpath, "OnExceptionCheckpoint")

    def on_exception(self, trainer: RunningTrainer, module: Module, exception: BaseException) -> None:
        """Save it. If that fails too, say so, and leave the first exception to be raised."""
        if trainer.state.fn != "fit":
            return
        try:
            trainer.save_checkpoint(self.ckpt_path)
        except Exception as error:
            log.warning("OnExceptionCheckpoint could not save %s: %s", self.ckpt_path, error)
        else:
            log.info("Saved %s after %s.", self.ckpt_path, type(exception).__name__)
