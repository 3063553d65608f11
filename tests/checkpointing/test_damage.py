"""Damaged checkpoints: every flipped bit, every cut and every missing file is noticed, and the file is named."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import torch
from forge import as_first_version
from tiny import Tiny, data

from raytrainer import CheckpointError, DataModule
from raytrainer.checkpointing import checked_reader, checkpoint_files
from raytrainer.checkpointing.checkpoint_files import CheckpointFolder
from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint
from raytrainer.checkpointing.checkpoint_meta import read_meta
from raytrainer.checkpointing.checksums import ChecksummedWriter, seal, unseal
from raytrainer.checkpointing.storage import LocalStorage


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"epoch": 1, "global_step": 5, "state_dict": {"w": torch.randn(300)}, "more": ["a", None]})
    return path


def test_any_flipped_bit_is_noticed(checkpoint: Path) -> None:
    draws = random.Random(0)
    for file in sorted(checkpoint.iterdir()):
        whole = file.read_bytes()
        places = range(8 * len(whole)) if file.name == "meta.json" else draws.sample(range(8 * len(whole)), 300)
        for place in places:
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"x\.ckpt") as caught:
                read_checkpoint(checkpoint)
            assert file.name in str(caught.value) or "not a checkpoint of raytrainer" in str(caught.value), place
        file.write_bytes(whole)
    assert read_checkpoint(checkpoint)["epoch"] == 1


def test_of_large_files_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are compared while they are read: whatever torch makes of the damage, it is told of as such."""
    monkeypatch.setattr(checkpoint_files, "_LARGE", 0)
    monkeypatch.setattr(checked_reader, "_PIECE", 100)
    assert read_checkpoint(checkpoint)["epoch"] == 1
    draws = random.Random(1)
    (file,) = checkpoint.glob("state-*")
    whole = file.read_bytes()
    # half of them where torch's index of the file is
    places = [draws.randrange(8 * len(whole)) for _ in range(100)] + [-draws.randrange(1, 8000) for _ in range(100)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{file.name}: the file is damaged: its content is not what was"):
            read_checkpoint(checkpoint)
    file.write_bytes(whole)
    with (
        pytest.raises(ZeroDivisionError),
        CheckpointFolder(LocalStorage(), str(checkpoint), "x").open(
            file.name, read_meta((checkpoint / "meta.json").read_bytes(), "x")["files"][file.name]
        ),
    ):
        1 / 0  # noqa: B018


@pytest.mark.parametrize("keep", [0.0, 0.5, -1])
def test_any_cut_is_noticed(keep: float, checkpoint: Path) -> None:
    for file in sorted(checkpoint.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[: int(keep * len(whole)) if keep >= 0 else -1])
        with pytest.raises(CheckpointError, match=file.name):
            read_checkpoint(checkpoint)
        file.unlink()
        with pytest.raises(CheckpointError, match=file.name):
            read_checkpoint(checkpoint)
        file.write_bytes(whole + b"\0")
        with pytest.raises(CheckpointError, match=file.name):
            read_checkpoint(checkpoint)
        file.write_bytes(whole)


def test_every_way_of_reading_notices(local_trainer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    trainer, module, path = local_trainer(max_epochs=1), Tiny(), tmp_path / "x.ckpt"
    trainer.fit(module, data())
    trainer.save_checkpoint(path)
    state = next(file for file in path.iterdir() if file.name != "meta.json")
    damaged = bytearray(state.read_bytes())
    damaged[len(damaged) // 2] ^= 64
    state.write_bytes(damaged)

    class Data(DataModule):
        pass

    for read in (
        lambda: local_trainer(max_epochs=2).fit(Tiny(), data(), ckpt_path=path),
        lambda: trainer.validate(module, data(4), ckpt_path=path, verbose=False),
        lambda: trainer.test(module, data(4), ckpt_path=path, verbose=False),
        lambda: trainer.predict(module, data(4), ckpt_path=path),
        lambda: Tiny.load_from_checkpoint(path),
        lambda: Data.load_from_checkpoint(path),
    ):
        with pytest.raises(CheckpointError, match=f"{state.name}: the file is damaged"):
            read()


def test_checkpoints_of_the_first_version_are_read(checkpoint: Path) -> None:
    size = next(checkpoint.glob("state-*")).stat().st_size
    assert read_checkpoint(as_first_version(checkpoint))["global_step"] == 5
    meta = (checkpoint / "meta.json").read_text()
    (checkpoint / "meta.json").write_text(meta.replace(f'"bytes": {size}', f'"bytes": {size + 1}'))
    with pytest.raises(CheckpointError, match="truncated"):
        read_checkpoint(checkpoint)


def test_a_sealed_document() -> None:
    document = {"a": [1, "\u00e9", None], "b": {"c": 0.5}}
    sealed = seal(document)
    assert unseal(sealed) == document and json.loads(sealed)["a"] == document["a"]
    assert unseal(sealed.replace(b"\\u00e9", b"\\u00E9")) is None  # the same text, but not the same bytes
    for other in (b"", b"[]", b"{}", b"\xff", b"[" * 10**6, json.dumps({"checksum": 1}).encode(), sealed[:-1]):
        assert unseal(other) is None


def test_the_first_failure_of_a_file_is_told() -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    writer = ChecksummedWriter(Full())
    torch.save({"w": torch.ones(10)}, writer)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No space left"):
        writer.record()
