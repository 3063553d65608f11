"""Blocks of tensors in pieces, read from a checkpoint or taken from memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from forge import in_two

from raytrainer.checkpointing import piece_files
from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint
from raytrainer.checkpointing.checksums import FileRecord
from raytrainer.checkpointing.pieces import InPieces, join_pieces

CPU = torch.device("cpu")


def joined(state: dict[str, Any]) -> dict[str, InPieces]:
    found: dict[str, InPieces] = join_pieces(state, lambda tensor: tensor)["state_dict"]
    return found


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_any_block(on_disk: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = torch.arange(7 * 3 * 2).remainder(2 if dtype is torch.bool else 100).to(dtype)
    tensors = {"weight": numbers.view(7, 3, 2), "scale": numbers[5].clone(), "list": numbers[:4]}
    state = in_two(tensors)
    if on_disk:
        write_checkpoint(tmp_path / "x.ckpt", state)
        state = read_checkpoint(tmp_path / "x.ckpt", lazily=True)
    for name, tensor in tensors.items():
        pieces = joined(state)[name]
        rows = len(tensor) if tensor.ndim else 0
        for first, last in ((0, rows), (0, rows // 2), (rows // 2, rows), (1, rows - 1)) if rows else ((0, 0),):
            at = (first,) + (0,) * (tensor.ndim - 1) if rows else ()
            wanted = tensor[first:last] if rows else tensor
            for device in (None, CPU):
                found = pieces.block(at, wanted.shape, device)
                assert found.dtype == dtype and found.shape == wanted.shape
                assert bytes(found.reshape(-1).view(torch.uint8)) == bytes(wanted.reshape(-1).view(torch.uint8))
                if device is not None:
                    found.reshape(-1).view(torch.uint8).fill_(1)  # the caller's own: nothing else changes
        assert bytes(tensor.reshape(-1).view(torch.uint8)) == bytes(pieces.whole().reshape(-1).view(torch.uint8))


def test_on_the_way_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrainer.checkpointing.checked_reader._FAR_PIECE", 300)
    content = torch.randint(256, (1000,), dtype=torch.uint8)
    data = bytes(content)
    room = torch.empty(1000, dtype=torch.uint8)
    record = FileRecord(1000, "xxh3_128:" + xxhash.xxh3_128(data).hexdigest())
    piece_files._read_across(io.BytesIO(data + b"more"), record, "x", room)
    assert torch.equal(room, content)
