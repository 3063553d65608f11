"""The thread that writes checkpoints, where one cannot be written."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny, data, weights

from raytrainer.callbacks import ModelCheckpoint
from raytrainer.driver.saving.checkpoint_writer import CheckpointWriter
from raytrainer.errors import CheckpointError, StateLostError
from raytrainer.worker.staging import Staging

STATE = {"epoch": 0, "global_step": 1, "state_dict": {}, "hyper_parameters": {}}


@pytest.fixture
def writer() -> Iterator[CheckpointWriter]:
    writer = CheckpointWriter()
    yield writer
    writer.flush()


def lost(superseded: bool) -> Any:
    def resolve() -> dict[str, Any]:
        raise StateLostError("all copies of the state are gone", lambda: superseded)

    return resolve


def test_the_one_before_stays_where_a_write_fails(writer: CheckpointWriter, tmp_path: Path) -> None:
    old, new = str(tmp_path / "old.ckpt"), str(tmp_path / "new.ckpt")
    writer.save(old, lambda: STATE)
    writer.flush()
    writer.save(new, lost(superseded=False))
    with pytest.raises(CheckpointError, match="all copies of the state are gone"):
        writer.remove(old)  # raises if the write has failed by now
        writer.flush()
    assert Path(old).exists() and not Path(new).exists()
    assert writer.exists(old) and not writer.exists(new)
    writer.remove(old)
    writer.flush()
    assert not Path(old).exists()


def test_a_thread_that_is_started_early_ends_where_nothing_is_saved(writer: CheckpointWriter, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writer.expecting():
        thread = writer._thread
        raise KeyboardInterrupt
    writer.flush()
    assert thread is not None
    assert not thread.is_alive() and not writer.busy
    with writer.expecting():
        early = writer._thread
        writer.save(str(tmp_path / "new.ckpt"), lambda: STATE)
        assert writer._thread is early
    writer.flush()
    assert (tmp_path / "new.ckpt").exists()


def test_who_waits_for_room_is_told_of_what_holds_a_state(writer: CheckpointWriter, tmp_path: Path) -> None:
    """Rather than to take more memory for the next one."""
    writer.save(str(tmp_path / "new.ckpt"), lost(superseded=False))
    with pytest.raises(CheckpointError, match="all copies of the state are gone"):
        writer.await_room(lambda: False)


def test_a_state_of_replaced_workers_is_told_of_only(
    writer: CheckpointWriter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = str(tmp_path / "new.ckpt")
    writer.save(new, lost(superseded=True))
    with caplog.at_level(logging.WARNING, "raytrainer"):
        writer.flush()
    assert "has not been written: all copies of the state are gone" in caplog.text
    writer.save(new, lambda: STATE)  # as the run comes by here again
    writer.flush()
    assert Path(new).exists()


def test_one_state_beside_the_live_one(local_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast saves follow each other; what two files of one moment have in common is held once."""
    held: list[weakref.ref[Any]] = []
    most = 0
    copy = Staging.copy

    def counted(self: Staging, state: Any, slot: int | None) -> Any:
        nonlocal most
        staged = copy(self, state, slot)
        held.append(weakref.ref(staged))
        places = {there["state_dict"]["large"].data_ptr() for ref in held if (there := ref()) is not None}
        most = max(most, len(places))
        return staged

    monkeypatch.setattr(Staging, "copy", counted)
    module = Tiny()
    module.register_buffer("large", torch.zeros(100_000))
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True, save_top_k=-1)
    trainer = local_trainer(max_epochs=2, callbacks=[saves])
    trainer.fit(module, data(8, 2))
    assert most == 1
    assert len(held) == 2 * trainer.global_step
    assert len(list(tmp_path.glob("*.ckpt"))) == trainer.global_step + 1
    last = Tiny.load_from_checkpoint(saves.last_model_path, strict=False)
    assert (weights(last) == weights(module)).all()
