"""Trainers that say and write nothing unless asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import raytrainer


def quiet(tmp_path: Path, **options: Any) -> raytrainer.Trainer:
    """A trainer that says and writes nothing unless asked."""
    defaults: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
    }
    return raytrainer.Trainer(**{**defaults, **options})
