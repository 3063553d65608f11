"""Checkpoints with other content, and checksums to match: what somebody who means it can do to a file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytrainer.checkpointing.checksums import ChecksummedWriter, seal
from raytrainer.checkpointing.pieces import KEY, Mark


def forge(path: Path, state: Any) -> Path:
    """Put another state into a checkpoint: bytes, or what `torch.save` is to write."""
    meta = json.loads((path / "meta.json").read_text())
    content = io.BytesIO()
    writer = ChecksummedWriter(content)
    if isinstance(state, bytes):
        writer.write(state)
    else:
        torch.save(state, writer)  # type: ignore[arg-type]
    (path / meta["state"]).write_bytes(content.getvalue())
    return forge_meta(path, files={meta["state"]: writer.record().as_json()})


def forge_meta(path: Path, **changes: Any) -> Path:
    """Change what `meta.json` says."""
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_bytes(seal({**meta, **changes}))
    return path


def as_first_version(path: Path, **changes: Any) -> Path:
    """Make it one of the format's first version, which had no checksums."""
    meta = json.loads((path / "meta.json").read_text())
    size = meta.pop("files")[meta["state"]]["bytes"]
    del meta["checksum"]
    (path / "meta.json").write_text(json.dumps({**meta, "version": 1, "bytes": size, **changes}, indent=2))
    return path


def in_two(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A state of two workers, each of which has half of the rows; of a single number both have it."""
    marks = {name: Mark(f"state_dict/{name}", tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def piece(tensor: Tensor, begin: int, end: int) -> dict[str, Any]:
        part = tensor[begin:end] if tensor.ndim else tensor
        return {
            "at": (begin,) + (0,) * (tensor.ndim - 1) if tensor.ndim else (),
            "shape": tuple(part.shape),
            "data": part,
        }

    halves = []
    for rank in range(2):
        bounds = {name: (len(t) // 2 * rank, len(t) // 2 if rank == 0 else len(t)) if t.ndim else (0, 0)
                  for name, t in tensors.items()}  # fmt: skip
        halves.append({f"state_dict/{name}": piece(t, *bounds[name]) for name, t in tensors.items()})
    return {"state_dict": marks, "epoch": 0, "global_step": 1, KEY: halves}
