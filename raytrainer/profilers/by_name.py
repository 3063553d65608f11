"""Profilers by name."""

from __future__ import annotations

from typing import Any

from raytrainer.errors import ConfigurationError
from raytrainer.plan.nearest_names import perhaps
from raytrainer.profilers.advanced import AdvancedProfiler
from raytrainer.profilers.profiler import Profiler
from raytrainer.profilers.pytorch import PyTorchProfiler
from raytrainer.profilers.simple import SimpleProfiler

__all__ = ["make_profiler"]


def make_profiler(profiler: Any) -> Profiler | None:
    """The profiler that `Trainer(profiler=...)` means.

    Raises:
        ConfigurationError: It is none.
    """
    if profiler is None or isinstance(profiler, Profiler):
        return profiler
    kinds: dict[str, type[Profiler]] = {
        "simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler,
    }  # fmt: skip
    kind = kinds.get(profiler) if isinstance(profiler, str) else None
    if isinstance(profiler, type):
        raise ConfigurationError(f"profiler={profiler.__name__}, a class: give an object, {profiler.__name__}(...).")
    if kind is None:
        raise ConfigurationError(
            f"profiler={profiler!r}: give {', '.join(map(repr, kinds))}, a Profiler, or None.{perhaps(profiler, kinds)}"
        )
    return kind()
