"""Disks that are full: what is told, what stays, and how training goes on."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny, data

from raytrainer import Callback, CheckpointError, ConfigurationError, ModelCheckpoint
from raytrainer.checkpointing import places
from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint
from raytrainer.checkpointing.places import find_checkpoints
from raytrainer.checkpointing.storage import LocalStorage
from raytrainer.errors import StorageError


class Small(LocalStorage):
    """A disk of so many bytes, shared by all files below a folder."""

    root: Path
    size: int

    @contextmanager
    def create(self, path: str) -> Iterator[Any]:
        disk = self

        class Sink:
            def write(self, data: bytes) -> None:
                file.flush()  # so that `used` counts it
                room = disk.size - disk.used()
                if len(data) > room:
                    file.write(data[: max(0, room)])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                file.write(data)

            def flush(self) -> None:
                file.flush()

            def fileno(self) -> int:
                return file.fileno()

        with super().create(path) as file:
            yield Sink()

    def used(self) -> int:
        return sum(file.stat().st_size for file in self.root.rglob("*") if file.is_file())

    def free_bytes(self, path: str) -> int:
        return self.size - self.used()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Small]:
    Small.root, Small.size = tmp_path, 10**9
    monkeypatch.setattr(places, "LocalStorage", Small)
    return Small


class Big(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("big", torch.zeros(25_000))  # 100 kB


STATE = {"epoch": 1, "state_dict": {"w": torch.zeros(25_000)}}


@pytest.mark.parametrize("size", [0, 50, 500, 40_000, 101_500])
def test_a_save_that_does_not_fit(size: int, disk: type[Small], tmp_path: Path) -> None:
    path = tmp_path / "c" / "x.ckpt"
    disk.size = size
    with pytest.raises(CheckpointError, match=r"x\.ckpt/.*: the disk is full\. [\d,]+ bytes .* bytes are free now"):
        write_checkpoint(path, STATE)
    assert not path.exists()
    disk.size = 10**6
    write_checkpoint(path, STATE)
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    disk.size = disk.used(disk()) + size
    with pytest.raises(CheckpointError, match="the disk is full"):
        write_checkpoint(path, {**STATE, "epoch": 2})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == files  # as before
    assert read_checkpoint(path)["epoch"] == 1


def test_fit_says_where_and_how_much(disk: type[Small], local_trainer: Any, tmp_path: Path) -> None:
    disk.size = 420_000
    saving = ModelCheckpoint(tmp_path / "c", save_top_k=-1)
    with pytest.raises(CheckpointError, match=r"epoch=3-step=40\.ckpt/state-\w+\.pt: the disk is full"):
        local_trainer(max_epochs=9, callbacks=saving).fit(Big(), data())
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [
        f"epoch={n}-step={10 * (n + 1)}.ckpt" for n in range(3)
    ]
    resumed = local_trainer(max_epochs=4, callbacks=ModelCheckpoint(tmp_path / "c", save_top_k=0))
    resumed.fit(Big(), data(), ckpt_path="last")
    assert resumed.ckpt_path.endswith("epoch=2-step=30.ckpt") and resumed.global_step == 40


class Shrinking(Callback):
    """Leaves room for so many more bytes in some epochs; waits until each save is done, so that they fail in turn."""

    def __init__(self, disk: type[Small], full: set[int]) -> None:
        self.disk, self.full = disk, full

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        trainer._writer.flush()
        room = 1000 if trainer.current_epoch in self.full else 10**6
        self.disk.size = self.disk.used(self.disk()) + room


@pytest.mark.parametrize("monitor", [None, "train_loss"])
@pytest.mark.parametrize("filename", [None, "one"])
def test_training_goes_on_where_that_is_asked_for(
    monitor: str | None, filename: str | None, disk: type[Small], local_trainer: Any, tmp_path: Path, caplog: Any
) -> None:
    class Logging(Big):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", -float(self.current_epoch), on_epoch=True)  # each is better than the one before
            return loss

    saving = ModelCheckpoint(
        tmp_path / "c", filename, monitor, save_last=True, on_error="warn", save_on_train_epoch_end=True
    )
    trainer = local_trainer(max_epochs=5, callbacks=[saving, Shrinking(disk, {0, 2, 4})])
    with caplog.at_level(logging.WARNING, "raytrainer"):
        trainer.fit(Logging(), data())
    assert trainer.global_step == 50 and trainer.state.status == "finished"
    told = [r.message for r in caplog.records if "training goes on without a checkpoint" in r.message]
    assert len(told) == 6 and all("the disk is full" in message for message in told)
    # of the fourth epoch, and nothing half-written beside
    name = "one.ckpt" if filename else "epoch=3-step=40.ckpt"
    assert saving.best_model_path == f"{tmp_path}/c/{name}" and saving.last_model_path == f"{tmp_path}/c/last.ckpt"
    assert {path for _, path in find_checkpoints(tmp_path / "c")} == {saving.best_model_path, saving.last_model_path}
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == sorted([name, "last.ckpt"])
    assert read_checkpoint(saving.best_model_path)["epoch"] == read_checkpoint(saving.last_model_path)["epoch"] == 3
    if monitor:
        assert {path: float(score) for path, score in saving.best_k_models.items()} == {saving.best_model_path: -3.0}
        assert float(saving.best_model_score) == -3.0


def test_only_the_disk_is_warned_of(local_trainer: Any, tmp_path: Path) -> None:
    class Odd(Callback):
        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["odd"] = object()

    saving = ModelCheckpoint(tmp_path / "c", on_error="warn")
    with pytest.raises(CheckpointError, match="entry odd is a object"):
        local_trainer(max_epochs=2, callbacks=[saving, Odd()]).fit(Tiny(), data())
    assert list((tmp_path / "c").iterdir()) == []
    with pytest.raises(ConfigurationError, match=r"on_error\)='ignore': give one of 'raise', 'warn'"):
        ModelCheckpoint(on_error="ignore")


@pytest.mark.parametrize("on_error", ["raise", "warn"])
@pytest.mark.parametrize("call", ["replace", "files"])
def test_an_old_checkpoint_that_cannot_be_deleted(
    call: str, on_error: Any, local_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """It is named, and training goes on where that was asked for; what comes later is deleted as usual."""
    first, real = f"{tmp_path}/c/epoch=0-step=10.ckpt", getattr(LocalStorage, call)
    removing = "raytrainer.driver.saving.checkpoint_writer.remove_checkpoint"
    remove, broken = places.remove_checkpoint, []

    def failing(self: LocalStorage, path: str, *more: str) -> Any:
        if broken and path.startswith(first):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(self, path, *more)

    def removed(path: str) -> None:
        broken.append(path)
        try:
            remove(path)
        finally:
            broken.clear()

    monkeypatch.setattr(LocalStorage, call, failing)
    monkeypatch.setattr(removing, removed)
    trainer = local_trainer(max_epochs=4, callbacks=ModelCheckpoint(tmp_path / "c", on_error=on_error))
    if on_error == "raise":
        with pytest.raises(StorageError, match=r"epoch=0-step=10\.ckpt: cannot be deleted: .*Permission denied"):
            trainer.fit(Tiny(), data())
    else:
        trainer.fit(Tiny(), data())
        told = [record.message for record in caplog.records if "with a checkpoint more" in record.message]
        assert len(told) == 1 and f"{first}: cannot be deleted: [Errno 13] Permission denied" in told[0]
        assert trainer.state.status == "finished" and len(find_checkpoints(tmp_path / "c")) == (call == "replace") + 1


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT])
def test_a_folder_that_is_not_kept_is_told(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LocalStorage.sync_folder

    def sync(self: LocalStorage, path: str) -> None:
        if path == str(tmp_path):
            raise OSError(number, os.strerror(number))
        real(self, path)

    monkeypatch.setattr(LocalStorage, "sync_folder", sync)
    with pytest.raises(StorageError, match=r"x\.ckpt: (cannot be written: .*Input/output error|the disk is full)"):
        write_checkpoint(tmp_path / "x.ckpt", {"state_dict": {}})
    assert not list(tmp_path.iterdir())
