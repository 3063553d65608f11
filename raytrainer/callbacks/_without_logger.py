"""Callbacks whose values only loggers show say so where there is none."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["warn_without_logger"]

log = logging.getLogger("raytrainer")


def warn_without_logger(name: str, trainer: TrainerView, what: str) -> None:
    """Once, as a fit begins."""
    if trainer.stage == "fit" and not trainer.loggers and trainer.is_global_zero:
        log.warning("%s: Trainer(logger=False), so that %s; give a logger, or leave the callback out.", name, what)
