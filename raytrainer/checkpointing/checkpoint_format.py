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
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from raytrainer.checkpointing.lightning_files import read_lightning_file
from raytrainer.checkpointing.places import CheckpointPath, RayCheckpoint, is_file, locate
from raytrainer.checkpointing.plain_values import plain_value
from raytrainer.checkpointing.restored_values import unpack_hyperparameters
from raytrainer.checkpointing.typed_values import pack_hyperparameters
from raytrainer.errors import CheckpointError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

__all__ = ["FORMAT_VERSION", "read_checkpoint", "write_checkpoint"]

FORMAT = "raytrainer-checkpoint"
FORMAT_VERSION = 2  # since 2, hyperparameters have their types


def write_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint, replacing one that is there.

    Args:
        path: The directory to make, or its URI.
        checkpoint: Plain values and tensors.

    Raises:
        CheckpointError: Something in it is neither; names it.
    """
    state = {name: _packed(name, value) for name, value in checkpoint.items()}
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


#: Entries whose values keep their types: whether somebody is told what cannot be stored.
TYPED = {
    f"{prefix}hyper_parameters{suffix}": not suffix for prefix in ("", "datamodule_") for suffix in ("", "_origin")
}


def _packed(name: str, value: Any) -> Any:
    if name in TYPED and isinstance(value, Mapping):
        return pack_hyperparameters(value, TYPED[name])
    return plain_value(value, name)


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


def read_checkpoint(
    path: CheckpointPath | IO[bytes],
    map_location: Any = "cpu",
    owners: Sequence[type] = (),
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Read a checkpoint, executing nothing from it.

    Args:
        path: Where it is: a directory, or a file of Lightning's, which may be an open one.
        map_location: Where to put tensors, as for `torch.load`.
        owners: The classes that are being loaded: hyperparameters may be classes and functions of their package.
        weights_only: See `read_lightning_file`.

    Raises:
        CheckpointError: There is none, or it is truncated, foreign, newer than this version, or not plain data.
    """
    if isinstance(path, RayCheckpoint):
        with path.as_directory() as folder:
            return read_checkpoint(folder, map_location, owners)
    if not isinstance(path, (str, os.PathLike)):
        return read_lightning_file(path, "the file", map_location, weights_only)
    path = os.fspath(path)
    filesystem, directory = locate(path)
    if is_file(filesystem, directory):
        with filesystem.open_input_file(directory) as stream:
            return read_lightning_file(io.BytesIO(stream.read()), path, map_location, weights_only)
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
    for name in TYPED.keys() & state.keys():
        state[name] = unpack_hyperparameters(state[name], owners)
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
