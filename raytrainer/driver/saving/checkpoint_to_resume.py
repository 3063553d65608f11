"""The checkpoint that a verb of the Trainer is told to use: a path, "best" or "last", found and read.

Which folders are searched is decided here; how one is listed, local or remote, in `checkpointing/places.py`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

from raytrainer.callbacks import Callback, ModelCheckpoint, WorkerCallback
from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.checkpointing.places import CheckpointPath, RayCheckpoint, newest_checkpoint
from raytrainer.driver.saving.beginning import Beginning
from raytrainer.errors import CheckpointError, ConfigurationError
from raytrainer.loggers import Logger
from raytrainer.worker.hook_calls import overridden

__all__ = ["read_to_resume"]

log = logging.getLogger("raytrainer")


def read_to_resume(
    ckpt_path: CheckpointPath | None,
    callbacks: Sequence[Callback | WorkerCallback],
    loggers: Sequence[Logger],
    default_root_dir: str,
    weights_only: bool | None = None,
    lazily: bool = False,
    begins: bool = True,
) -> Beginning | None:
    """The checkpoint, with where it was found as "path"; None: there is none to use.

    Args:
        ckpt_path: A path, a URI, Ray's object, "best" (of the callbacks' best), "last" (see `Trainer.fit`), or None.
        callbacks: Those of the run.
        loggers: They say where checkpoints go that have no folder of their own.
        default_root_dir: Where those go without a logger.
        weights_only: False: execute what a file of Lightning's asks for.
        lazily: Leave tensors that are in pieces to the workers, each of which reads what it needs.
        begins: Whether a run that finds none begins at the beginning, as `fit` does.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    if ckpt_path is None:
        return None
    if isinstance(ckpt_path, RayCheckpoint):
        return Beginning({**read_checkpoint(ckpt_path), "path": str(ckpt_path)})
    if not isinstance(ckpt_path, (str, os.PathLike)):
        raise ConfigurationError(f'ckpt_path={ckpt_path!r}: give a path, a URI, "last", "best" or None.')
    path: str | None = os.fspath(ckpt_path)
    savers = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    if path == "best":
        path = next((saver.best_model_path for saver in savers if saver.best_model_path), None)
        if path is None:
            raise CheckpointError('ckpt_path="best": no ModelCheckpoint of this trainer has one; give its path.')
    elif path == "last":
        path = _newest(savers, loggers, default_root_dir)
        if path is None:
            if begins:
                log.info('ckpt_path="last": there is no checkpoint yet; beginning at the beginning.')
            else:
                log.warning('ckpt_path="last": there is no checkpoint; the weights are those that the module has.')
            return None
    assert path is not None
    try:
        checkpoint = read_checkpoint(path, weights_only=weights_only, lazily=lazily)
    except CheckpointError:
        newer = _newest(savers, loggers, default_root_dir) if ckpt_path == "last" else path
        if newer == path or newer is None:
            raise
        # another run has saved a newer one meanwhile, and has removed the one that was found
        checkpoint, path = read_checkpoint(newer, weights_only=weights_only, lazily=lazily), newer
    # what is not as it was read cannot be read anew
    changed = "made_by" in checkpoint or any(
        isinstance(callback, Callback) and overridden(callback, "on_load_checkpoint") for callback in callbacks
    )
    again = None if changed else functools.partial(_read_again, path, lazily, "progress" in checkpoint)
    return Beginning({**checkpoint, "path": path}, again)


def _read_again(path: str, lazily: bool, whole: bool) -> dict[str, Any]:
    """For workers in place of those that were lost before there was a snapshot."""
    try:
        checkpoint = read_checkpoint(path, lazily=lazily)
        if whole and "progress" not in checkpoint:
            raise CheckpointError(f"{path}: it has been replaced, by weights alone.")
    except CheckpointError as error:
        raise CheckpointError(
            f"Workers were lost before there was a snapshot, and the checkpoint that this run began with is not to be "
            f"had any more: {error}"
        ) from error
    return checkpoint


def _newest(savers: Sequence[ModelCheckpoint], loggers: Sequence[Logger], default_root_dir: str) -> str | None:
    """The newest checkpoint where the callbacks write, or would have written in an earlier process."""
    places = {saver.dirpath for saver in savers if saver.dirpath is not None}
    if any(saver.dirpath is None for saver in savers):
        # each process has a log directory of its own, side by side
        roots = [logger.root_dir for logger in loggers if logger.log_dir and logger.root_dir]
        places.add(roots[0] if roots else f"{default_root_dir}/checkpoints")
    return newest_checkpoint(places)
