"""Files that are replaced whole keep what they had when that fails, be it at a kill, a power cut or on a full disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from raytrainer import CSVLogger
from raytrainer.checkpointing.storage import LocalStorage
from raytrainer.replaced_file import replaced


def test_it_is_on_the_disk_before_it_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "x", []
    path.write_text("old")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to("x")
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("sync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    with replaced(tmp_path / "link") as file:
        file.write("new")
        assert path.read_text() == "old" and calls == []
    assert path.read_text() == "new" and calls == ["sync", "replace", "sync"]
    assert path.stat().st_mode & 0o777 == 0o640 and (tmp_path / "link").is_symlink()
    with pytest.raises(ZeroDivisionError), replaced(path) as file:
        file.write("newer")
        1 / 0  # noqa: B018
    assert path.read_text() == "new" and sorted(os.listdir(tmp_path)) == ["link", "x"]
    long = tmp_path / ("x" * 255)
    with replaced(long) as file:
        file.write("new")
    assert long.read_text() == "new"


def test_the_first_failure_is_told_where_the_disk_takes_no_deletion_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "unlink", broken)
    monkeypatch.setattr(Path, "unlink", broken)
    with pytest.raises(ZeroDivisionError), replaced(tmp_path / "x"):
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError), LocalStorage().create(str(tmp_path / "y")):
        1 / 0  # noqa: B018


def test_a_full_disk_takes_no_rows_and_no_hyperparameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = CSVLogger(tmp_path, version="mine")
    logger.log_hyperparams({"a": 1})
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    folder = Path(logger.log_dir)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            logger.log_hyperparams({"b": 2})
        logger.log_metrics({"accuracy": 0.5}, 1)  # a new column: all is written anew
        with pytest.raises(OSError, match="No space"):
            logger.save()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    logger.log_hyperparams({"c": 3})
    logger.save()
    assert json.loads((folder / "hparams.json").read_text()) == {"a": 1, "b": 2, "c": 3}
    assert (folder / "metrics.csv").read_text().splitlines() == ["epoch,step,loss,accuracy", ",0,1.0,", ",1,,0.5"]


def test_a_folder_that_may_be_written_to_but_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def guarded(path: Any, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return really(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", guarded)
    with replaced(tmp_path / "x") as file:
        file.write("new")
    assert (tmp_path / "x").read_text() == "new"
