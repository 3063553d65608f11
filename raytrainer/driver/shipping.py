"""The user's own modules on their way to the workers of a cluster: what Ray is told to ship, and how much it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raytrainer.errors import ConfigurationError

__all__ = ["runtime_environment", "script_directory"]

#: Never shipped, in the patterns of .gitignore; what .gitignore and .rayignore name is left out by Ray itself.
EXCLUDES = [
    ".*/",
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


def _refuse_large(folder: Path) -> None:
    sizes: Counter[str] = Counter()
    for path in _files(folder):
        try:
            sizes[path.parts[0]] += (folder / path).stat().st_size
        except OSError:
            continue  # gone in the meantime, or a broken link
        if sizes.total() > LIMIT:
            largest = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in sizes.most_common(3))
            raise ConfigurationError(
                f"The script's directory, {folder}, would be shipped to the workers so that they can import your "
                f"modules, but it holds more than {LIMIT // 2**20} MiB: {largest}, ... Name what is not needed in "
                f".gitignore or .rayignore; or say what to ship: Trainer(runtime_env={{'working_dir': ..., "
                f"'excludes': [...]}}), or {{'py_modules': [...]}}; runtime_env={{}} ships nothing."
            )


def _files(folder: Path) -> Iterator[Path]:
    """What Ray would ship, nearly: files that git does not ignore, where there is git, else all that are not hidden."""
    command = ["git", "-C", str(folder), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        listed = None
    if listed is not None and listed.returncode == 0:
        yield from (Path(os.fsdecode(name)) for name in listed.stdout.split(b"\0") if name)
        return
    skipped = {pattern.rstrip("/") for pattern in EXCLUDES}
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in skipped and not f.endswith(".ckpt")]
        yield from (Path(parent, name).relative_to(folder) for name in files)
