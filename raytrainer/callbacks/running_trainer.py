"""`RunningTrainer`: what a hook of a driver callback is given, as editors and type checkers see it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from raytrainer.errors import CheckpointError
from raytrainer.plan.run_arguments import RunArguments
from raytrainer.view.trainer_properties import TrainerProperties

__all__ = ["RunningTrainer"]


class RunningTrainer(TrainerProperties, RunArguments, Any):  # type: ignore[misc]  # on purpose, see below
    """The `Trainer` that runs. Never made: it stands for that class, which the callbacks' files cannot import.

    Deriving from `Any` lets a hook say `trainer: raytrainer.Trainer` as well; a hook without annotations gets the names
    below and those of its bases.
    """

    if TYPE_CHECKING:

        def save_checkpoint(
            self,
            filepath: str | os.PathLike[str],
            weights_only: bool = False,
            wait: bool = False,
            on_error: Callable[[CheckpointError], None] | None = None,
        ) -> None:
            """See `Trainer.save_checkpoint`."""

        def remove_checkpoint(self, filepath: str, on_error: Callable[[CheckpointError], None] | None = None) -> None:
            """See `Trainer.remove_checkpoint`."""

        def checkpoint_exists(self, filepath: str) -> bool:
            """See `Trainer.checkpoint_exists`."""

        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            """See `Trainer.log_metrics`."""
