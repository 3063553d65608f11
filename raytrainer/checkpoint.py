"""The checkpoint format: a directory, on a local path or any filesystem that pyarrow knows by URI.

    name.ckpt/
      meta.json          format, version, name and size of the state file, epoch, step, versions of the software
      state-<hex>.pt     a dict of plain values and tensors, written by torch.save

The state file is written first, under a name of its own; `meta.json` is then put in place in one move, and older state
files are deleted. So at every moment the directory holds one whole checkpoint, or none. Reading never executes code
from the file (`weights_only=True`).
"""

from __future__ import annotations

import io
import json
import logging
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable
from urllib.parse import quote

import torch
from torch import Tensor, nn

from raytrainer.errors import CheckpointError
from raytrainer.plan.retention import split_query

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

__all__ = [
    "FORMAT_VERSION",
    "CheckpointPath",
    "RayCheckpoint",
    "checkpoint_exists",
    "export_weights",
    "find_checkpoints",
    "load_into",
    "locate",
    "read_checkpoint",
    "remove_checkpoint",
    "write_checkpoint",
]

log = logging.getLogger("raytrainer")

FORMAT = "raytrainer-checkpoint"
FORMAT_VERSION = 1


def locate(path: str | Path) -> tuple[FileSystem, str]:
    """The filesystem of a path or URI, and the path on it."""
    from pyarrow import fs

    text = str(path)
    if "://" in text:
        base, query = split_query(text)
        # pyarrow refuses what URIs must escape, such as spaces, and undoes the escapes
        filesystem, inner = fs.FileSystem.from_uri(quote(base, safe=":/@[]%=+,;~") + query)
        return filesystem, inner.rstrip("/")
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))


def write_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint, replacing one that is there.

    Args:
        path: The directory to make, or its URI.
        checkpoint: Plain values and tensors.

    Raises:
        CheckpointError: Something in it is neither; names it.
    """
    state = {
        name: _hyper_parameters(value) if name.endswith("hyper_parameters") else _portable(value, name)
        for name, value in checkpoint.items()
    }
    filesystem, directory = locate(path)
    filesystem.create_dir(directory, recursive=True)
    name = f"state-{uuid.uuid4().hex[:12]}.pt"
    size = _write_state(filesystem, f"{directory}/{name}", state)
    meta = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "state": name,
        "bytes": size,
        "epoch": checkpoint.get("epoch"),
        "global_step": checkpoint.get("global_step"),
        "versions": _versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with filesystem.open_output_stream(f"{directory}/{name}.json") as stream:
        stream.write(json.dumps(meta, indent=2).encode())
    filesystem.move(f"{directory}/{name}.json", f"{directory}/meta.json")
    _delete_other_states(filesystem, directory, name)


def _write_state(filesystem: FileSystem, path: str, state: dict[str, Any]) -> int:
    """Write the state file; return its size in bytes.

    torch writes to a real file, not to a stream, since only then it lets other threads run: training goes on.
    """
    from pyarrow import fs

    if isinstance(filesystem, fs.LocalFileSystem):
        torch.save(state, path)
        return os.path.getsize(path)
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "state.pt")
        torch.save(state, local)
        fs.copy_files(local, path, destination_filesystem=filesystem, source_filesystem=fs.LocalFileSystem())
        return os.path.getsize(local)


def _delete_other_states(filesystem: FileSystem, directory: str, keep: str) -> None:
    from pyarrow import fs

    for entry in filesystem.get_file_info(fs.FileSelector(directory)):
        if entry.base_name.startswith("state-") and entry.base_name != keep:
            filesystem.delete_file(entry.path)


def _versions() -> dict[str, str]:
    from raytrainer.version import __version__

    return {"raytrainer": __version__, "torch": torch.__version__, "python": platform.python_version()}


@runtime_checkable
class RayCheckpoint(Protocol):
    """A `ray.tune.Checkpoint` or `ray.train.Checkpoint`: a directory somewhere."""

    def as_directory(self) -> AbstractContextManager[str]:
        """A local copy, or the directory itself if it is local."""


#: Where a checkpoint is: a path, a URI, or one of Ray's own objects.
CheckpointPath: TypeAlias = str | os.PathLike[str] | RayCheckpoint


def read_checkpoint(path: CheckpointPath, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, executing nothing from it.

    Raises:
        CheckpointError: There is none, or it is truncated, foreign, newer than this version, or not plain data.
    """
    if isinstance(path, RayCheckpoint):
        with path.as_directory() as folder:
            return read_checkpoint(folder, map_location)
    path = os.fspath(path)
    filesystem, directory = locate(path)
    meta = _read_meta(filesystem, directory, str(path))
    try:
        with filesystem.open_input_stream(f"{directory}/{meta['state']}") as stream:
            data = stream.read()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: its state file {meta['state']} is missing; use another checkpoint.") from None
    if len(data) != meta["bytes"]:
        raise CheckpointError(
            f"{path}: its state file has {len(data)} bytes instead of {meta['bytes']}: it is truncated; use another "
            f"checkpoint."
        )
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: its state file is damaged, or holds more than plain data, which is never executed: {error}"
        ) from None
    return state


def _read_meta(filesystem: FileSystem, directory: str, shown: str) -> dict[str, Any]:
    try:
        with filesystem.open_input_stream(f"{directory}/meta.json") as stream:
            meta = json.loads(stream.read())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{shown}: no checkpoint there (a checkpoint is a directory with a meta.json).") from None
    except (ValueError, UnicodeDecodeError):
        raise CheckpointError(f"{shown}: its meta.json is damaged; use another checkpoint.") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or not _is_whole(meta):
        raise CheckpointError(f"{shown}: this is not a checkpoint of raytrainer.")
    if meta["version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{shown}: it has format version {meta['version']}, this raytrainer reads up to {FORMAT_VERSION}; it was "
            f"written by {meta.get('versions')}. Upgrade raytrainer."
        )
    return meta


def _is_whole(meta: Mapping[str, Any]) -> bool:
    state = meta.get("state")
    named = isinstance(state, str) and state.startswith("state-") and "/" not in state
    return named and isinstance(meta.get("version"), int) and isinstance(meta.get("bytes"), int)


def checkpoint_exists(path: str | Path) -> bool:
    """Whether a whole checkpoint is there."""
    from pyarrow import fs

    filesystem, directory = locate(path)
    return bool(filesystem.get_file_info(f"{directory}/meta.json").type == fs.FileType.File)


def find_checkpoints(root: str | Path) -> list[tuple[float, str]]:
    """(time of writing in seconds, path) of every checkpoint in a directory tree."""
    from pyarrow import fs

    filesystem, directory = locate(root)
    base, query = split_query(str(root))
    base = base.rstrip("/")
    entries = filesystem.get_file_info(fs.FileSelector(directory, allow_not_found=True, recursive=True))
    return [
        (entry.mtime_ns / 1e9, base + entry.path.removesuffix("/meta.json").removeprefix(directory) + query)
        if "://" in base
        else (entry.mtime_ns / 1e9, entry.path.removesuffix("/meta.json"))
        for entry in entries
        if entry.base_name == "meta.json"
    ]


def remove_checkpoint(path: str | Path) -> None:
    """Delete a checkpoint, if it is there. Never deletes a directory that is not one."""
    if checkpoint_exists(path):
        filesystem, directory = locate(path)
        filesystem.delete_file(f"{directory}/meta.json")  # from here on it is no checkpoint any more
        filesystem.delete_dir(directory)


def load_into(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """`load_state_dict`, whose complaint says what to do.

    Raises:
        CheckpointError: Keys or shapes do not match.
    """
    try:
        module.load_state_dict(dict(state_dict), strict=strict)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint's weights do not fit {type(module).__name__}: {error}\nConstruct the module as it was "
            f"when saved, or set strict_loading = False on it to load what matches."
        ) from None


def _portable(value: Any, where: str) -> Any:
    """The value in types that can be read back without executing anything.

    Raises:
        CheckpointError: There is no such form; `where` names it.
    """
    if value is None or isinstance(value, (bool, torch.dtype, torch.device)):
        return value
    exact: tuple[Any, ...] = (int, float, complex, bytes)
    for kind in exact:
        if isinstance(value, kind):  # NumPy's float64 is a float, and an IntEnum's member an int: store what they are
            return value if type(value) is kind else kind(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, nn.Parameter):
        return value.detach()
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        return {_portable(key, where): _portable(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        items = [_portable(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else set(items) if isinstance(value, set) else tuple(items)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return torch.as_tensor(value) if getattr(value, "ndim", 0) else value.tolist()
    raise CheckpointError(
        f"checkpoint entry {where} is a {type(value).__name__}: store numbers, strings, tensors, and lists, tuples, "
        f"dicts or sets of them."
    )


def _hyper_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters, less those that cannot be stored as plain values."""
    kept = {}
    for name, value in values.items():
        try:
            kept[name] = _portable(value, name)
        except CheckpointError:
            log.warning(
                "Hyperparameter %r is a %s and is left out of checkpoints; pass it to load_from_checkpoint(...), or "
                "ignore it in save_hyperparameters(ignore=[...]).", name, type(value).__name__,
            )  # fmt: skip
    return kept


def export_weights(module: nn.Module, path: str | Path) -> None:
    """Write the module's state dict alone: as safetensors if `path` ends in ".safetensors", else with torch.save.

    Raises:
        CheckpointError: The safetensors package is missing.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    if not str(path).endswith(".safetensors"):
        torch.save(state, path)
        return
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise CheckpointError(f"{path}: install the package safetensors to write this format.") from None
    # the format refuses tensors that share memory, such as tied weights: each gets its own
    save_file({name: tensor.clone() for name, tensor in state.items()}, str(path))
