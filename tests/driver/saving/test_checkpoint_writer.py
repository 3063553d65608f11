"""The thread that writes checkpoints, where one cannot be written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrainer.driver.saving.checkpoint_writer import CheckpointWriter
from raytrainer.errors import CheckpointError, StateLostError

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
