"""`CheckpointVerbs`: what a Trainer saves, and which checkpoint its verbs go on from."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from raytrainer.callbacks import Callback, ModelCheckpoint
from raytrainer.checkpointing.checkpoint_format import write_checkpoint
from raytrainer.checkpointing.places import CheckpointPath, same_place
from raytrainer.driver.saving.beginning import Beginning
from raytrainer.driver.saving.checkpoint_to_resume import read_to_resume
from raytrainer.driver.saving.checkpoint_writer import idle_checkpoint
from raytrainer.errors import CheckpointError
from raytrainer.module import Module
from raytrainer.plan.given_arguments import verb_answers
from raytrainer.trainer_runs import TrainerRuns

__all__ = ["CheckpointVerbs"]

log = logging.getLogger("raytrainer")


class CheckpointVerbs(TrainerRuns):
    """The checkpoints of a `Trainer`."""

    @verb_answers
    def save_checkpoint(
        self,
        filepath: str | os.PathLike[str],
        weights_only: bool = False,
        wait: bool = False,
        on_error: Callable[[CheckpointError], None] | None = None,
    ) -> None:
        """Save a checkpoint: a directory, replaced in one move if it exists. A link is followed, as by any program.

        Args:
            filepath: A path, or a URI that pyarrow knows ("s3://bucket/name.ckpt").
            weights_only: Leave out what only resuming needs. Otherwise, after `fit`, it is the whole state at its end,
                with the weights that the module has now.
            wait: Return when it is written; otherwise writing goes on in the background while there is a run.
            on_error: Called, in the background's thread, if it cannot be written there, the disk being full, say;
                without it the next call, or the end of the run, raises that.

        Raises:
            CheckpointError: There is nothing to save, something in it is no plain value, or it cannot be written.
        """
        if self._module is None:
            raise CheckpointError("save_checkpoint: this trainer has no module yet; run fit first.")
        path = os.fspath(filepath)
        if self._run is None or not self._run.save(path, weights_only, wait, on_error):
            rest = None if weights_only else self._end_state(self._module)
            state = idle_checkpoint(self._module, self._state.progress, rest)
            self._emit("on_save_checkpoint", state)
            write_checkpoint(path, state)

    def _end_state(self, module: Module) -> dict[str, Any]:
        """What only resuming needs, of the fit that this module has had."""
        if self._fitted is None or self._fitted.module is not module or self._fitted.end_state is None:
            raise CheckpointError(
                "save_checkpoint: there is no run to go on from: this trainer has not fitted this module to an end. "
                "save_checkpoint(..., weights_only=True) saves the weights."
            )
        state = self._fitted.end_state.resolve()
        own = {
            callback.state_key: callback.state_dict() for callback in self._callbacks if isinstance(callback, Callback)
        }
        if self._datamodule is not None:  # has its state since it came home
            state["datamodule"] = self._datamodule.state_dict()
        return state | {"callbacks": state["callbacks"] | own}

    def remove_checkpoint(self, filepath: str, on_error: Callable[[CheckpointError], None] | None = None) -> None:
        """Delete a checkpoint, in the background, but never the one that this run went on from; of a link, the link
        alone.

        Args:
            filepath: Path or URI.
            on_error: Called, in the background's thread, if it cannot be deleted; without, that ends the run.
        """
        begun_with = self.ckpt_path
        if begun_with is None or not same_place(str(begun_with), filepath):
            self._writer.remove(filepath, on_error)

    def checkpoint_exists(self, filepath: str) -> bool:
        """Whether a whole checkpoint is there."""
        return self._writer.exists(filepath)

    def _read(
        self, ckpt_path: CheckpointPath | None, weights_only: bool | None, begins: bool = False
    ) -> Beginning | None:
        lazily, root = self._settings.sharding is not None, self.default_root_dir
        return read_to_resume(ckpt_path, self._callbacks, self._loggers, root, weights_only, lazily, begins)

    def _chosen(self, stage: str, model: Module | None, ckpt_path: CheckpointPath | None) -> CheckpointPath | None:
        """The checkpoint that an evaluation uses: of the trainer's own fit, without a model, the best."""
        if (
            model is not None
            or ckpt_path is not None
            or self._fitted is None
            or self._fitted.module is not self._module
        ):
            return ckpt_path
        savers = [callback for callback in self._callbacks if isinstance(callback, ModelCheckpoint)]
        best = next((saver.best_model_path for saver in savers if saver.best_model_path), None)
        if best is None:
            log.info("%s() without a model: this fit has no best checkpoint; taking the weights at its end.", stage)
        else:
            log.info("%s() without a model takes the best checkpoint of the fit, %s; for the weights at its end give "
                     "the model.", stage, best)  # fmt: skip
        return best
