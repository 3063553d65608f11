"""The checkpoint format: a directory, on a local path or any filesystem that pyarrow knows by URI.

    name.ckpt/
      meta.json        format, version, epoch, step, versions of the software; its files with sizes and checksums
      state-<id>.pt    a dict of plain values and tensors, written by torch.save
      pieces-<id>.json, rank<n>-<id>.safetensors
                       of a module in shards: its tensors, see `piece_files.py`

How files come there, and are checked, is `checkpoint_files.py`'s. Reading never executes code from a file
(`weights_only=True`).
"""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import IO, Any, cast

import torch

from raytrainer.checkpointing.checkpoint_files import CheckpointFolder
from raytrainer.checkpointing.checksums import ChecksummedWriter
from raytrainer.checkpointing.lightning_files import read_lightning_file
from raytrainer.checkpointing.new_checkpoint import NewCheckpoint
from raytrainer.checkpointing.piece_files import read_pieces, write_pieces
from raytrainer.checkpointing.pieces import KEY, map_tree, whole_state
from raytrainer.checkpointing.places import CheckpointPath, RayCheckpoint, folder_at, is_file, locate
from raytrainer.checkpointing.plain_values import plain_value
from raytrainer.checkpointing.reservations import release
from raytrainer.checkpointing.restored_values import unpack_hyperparameters
from raytrainer.checkpointing.typed_values import pack_hyperparameters
from raytrainer.errors import CheckpointError
from raytrainer.hparams import HYPERPARAMETERS

__all__ = ["IN_MEMORY", "read_checkpoint", "write_checkpoint"]

#: What only snapshots have, of what each worker has for itself: for workers that go on within the same run.
IN_MEMORY = "attributes"

#: How often a checkpoint may be replaced while it is read, each time so soon that its files are gone.
_REPLACED = 5


def write_checkpoint(
    path: str | Path, checkpoint: Mapping[str, Any], given_up: Callable[[], bool] | None = None
) -> None:
    """Write a checkpoint, replacing one that is there.

    Args:
        path: The directory to make, or its URI.
        checkpoint: Plain values and tensors, which may be in pieces.
        given_up: Asked now and then, whether to leave it at that.

    Raises:
        CheckpointError: Something in it is neither; names it. Or it cannot be written; names the file.
        GivenUpError: Nothing of it is left.
    """
    if "own" in checkpoint:
        own = [{name: item for name, item in part.items() if name != IN_MEMORY} for part in checkpoint["own"]]
        checkpoint = {**checkpoint, "own": own}
    with ExitStack() as stack:
        stack.callback(release, os.fspath(path))
        if KEY not in checkpoint:  # what cannot be stored is told before anything is written
            state = {name: _packed(name, value) for name, value in checkpoint.items()}
        new = stack.enter_context(NewCheckpoint(folder_at(path), given_up))
        extra: dict[str, Any] = {}
        if KEY in checkpoint:
            rest, extra["pieces"] = write_pieces(new, checkpoint)
            state = {name: _packed(name, value) for name, value in rest.items()}
        name = f"state-{new.id}.pt"
        new.write(name, lambda file: _save(state, file))
        new.publish(
            {
                "state": name,
                **extra,
                "epoch": checkpoint.get("epoch"),
                "global_step": checkpoint.get("global_step"),
                "versions": _versions(),
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        )


def _packed(name: str, value: Any) -> Any:
    if name in HYPERPARAMETERS and isinstance(value, Mapping):
        return pack_hyperparameters(value, say=not name.endswith("_origin"))
    return plain_value(value, name)


def _save(state: dict[str, Any], file: ChecksummedWriter) -> None:
    """`torch.save`, less torch's own checksums: they take longer than all the rest, and torch never looks at them."""
    with ExitStack() as stack:
        stack.enter_context(_without_crc32())

        def write(data: Any) -> int:
            stack.close()  # torch has asked by now; what others save meanwhile is not concerned
            return file.write(data)

        torch.save(state, cast(Any, SimpleNamespace(write=write, flush=file.flush)))


_crc32 = Lock()


@contextmanager
def _without_crc32() -> Iterator[None]:
    with _crc32:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(before)


def _versions() -> dict[str, str]:
    from raytrainer.version import __version__

    return {"raytrainer": __version__, "torch": torch.__version__, "python": platform.python_version()}


def read_checkpoint(
    path: CheckpointPath | IO[bytes],
    map_location: Any = "cpu",
    owners: Sequence[type] = (),
    weights_only: bool | None = None,
    lazily: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint, executing nothing from it.

    Args:
        path: Where it is: a directory, or a file of Lightning's, which may be an open one.
        map_location: Where to put tensors, as for `torch.load`.
        owners: The classes that are being loaded: hyperparameters may be classes and functions of their package.
        weights_only: See `read_lightning_file`.
        lazily: Leave tensors that are in pieces where they are; see `pieces.py`.

    Raises:
        CheckpointError: There is none, or a file of it is missing or not what was written; or it is foreign, newer than
            this version, or not plain data.
    """
    if isinstance(path, RayCheckpoint):
        with path.as_directory() as local:
            return read_checkpoint(local, map_location, owners)
    if not isinstance(path, (str, os.PathLike)):
        return read_lightning_file(path, "the file", map_location, weights_only)
    path = os.fspath(path)
    filesystem, directory = locate(path)
    if is_file(filesystem, directory):
        with filesystem.open_input_file(directory) as stream:
            return read_lightning_file(io.BytesIO(stream.read()), path, map_location, weights_only)
    folder = folder_at(path)
    meta = folder.meta()
    for _ in range(_REPLACED):
        try:
            return _read(folder, meta, map_location, owners, lazily)
        except CheckpointError:
            before, meta = meta, folder.meta()
            if meta == before:
                raise
    return _read(folder, meta, map_location, owners, lazily)


def _read(
    folder: CheckpointFolder, meta: Mapping[str, Any], map_location: Any, owners: Sequence[type], lazily: bool
) -> dict[str, Any]:
    path, name = folder.shown, meta.get("state")
    if not isinstance(name, str) or name not in meta["files"]:
        raise CheckpointError(f"{path}: this is not a checkpoint of raytrainer.")
    with folder.open(name, meta["files"][name]) as file:
        try:
            state: dict[str, Any] = torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:
            if "deserialize object on" in str(error):  # whole, but for a device that is not here
                raise CheckpointError(f"{path}/{name}, map_location={map_location!r}: {error}") from None
            raise CheckpointError(
                f"{path}/{name}: the file is damaged, or holds more than plain data, which is never executed: {error}"
            ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}/{name}: it holds a {type(state).__name__}, not a state.")
    index = meta.get("pieces")
    if index is not None:
        if not isinstance(index, str) or index not in meta["files"]:
            raise CheckpointError(f"{path}: this is not a checkpoint of raytrainer.")
        state = read_pieces(folder, index, meta["files"], state)
        if not lazily:
            state = whole_state(state)
            if isinstance(map_location, (str, torch.device)):
                state = dict(map_tree(state, lambda v, path: v.to(map_location) if isinstance(v, torch.Tensor) else v))
    for name in state.keys() & set(HYPERPARAMETERS):
        state[name] = unpack_hyperparameters(state[name], owners)
    return state
