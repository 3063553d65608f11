"""The user's own modules on their way to the workers of a cluster: what Ray is told to ship, and how much it is."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrainer.errors import ConfigurationError
from raytrainer.private import ray_private

__all__ = ["runtime_environment", "script_directory"]

#: Never shipped, in the patterns of .gitignore; what .gitignore names, and .rayignore for newer Rays, Ray leaves out.
EXCLUDES = [
    ".?*",  # not ".", which is the directory itself
    "__pycache__/",
    "node_modules/",
    "venv/",
    "*.egg-info/",
    "*.ckpt/",
    "*.pt",
    "*.safetensors",
    "raytrainer_logs/",
    "lightning_logs/",
    "mlruns/",
    "wandb/",
]

#: Bytes that are shipped without being told to. Every node gets a copy before its first worker starts.
LIMIT = 100 * 2**20


def script_directory() -> Path:
    """Where the user's own modules are: beside the script; else, in a notebook say, the working directory."""
    main = sys.modules.get("__main__")
    script = getattr(main, "__file__", None)
    by_module = getattr(main, "__spec__", None) is not None  # python -m
    if script is None or by_module or Path(script).resolve().is_relative_to(Path(sys.prefix).resolve()):
        return Path.cwd()
    return Path(script).resolve().parent


def runtime_environment(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The runtime environment for a cluster that is attached to.

    Args:
        given: What the user asked for; None: the script's directory.

    Raises:
        ConfigurationError: The directory is too large to be shipped unasked.
    """
    # set by `ray job submit`, whose own environment has the working directory that it was told
    if given is not None or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return dict(given or {})
    folder = script_directory()
    _refuse_large(folder)
    return {"working_dir": str(folder), "excludes": EXCLUDES}


class _TooLarge(Exception):
    """Enough has been seen."""


def _refuse_large(folder: Path) -> None:
    sizes: Counter[str] = Counter()

    def count(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder).parts[0]] += path.stat().st_size
        if sizes.total() > LIMIT:
            raise _TooLarge

    try:
        ray_private.visit_shipped(folder, EXCLUDES, count)
    except _TooLarge:
        largest = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in sizes.most_common(3))
        raise ConfigurationError(
            f"The script's directory, {folder}, would be shipped to the workers so that they can import your modules, "
            f"but it holds more than {LIMIT // 2**20} MiB: {largest}, ... Name what is not needed in "
            f".gitignore; or say what to ship: Trainer(runtime_env={{'working_dir': ..., 'excludes': [...]}}), or "
            f"{{'py_modules': [...]}}; runtime_env={{}} ships nothing."
        ) from None
