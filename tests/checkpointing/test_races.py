"""Two drivers at one checkpoint: one does all that it does at each moment of what the other one does.

A moment is before each call that looks at the disk, or changes it.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from tiny import Tiny, data

from raytrainer import ModelCheckpoint
from raytrainer.checkpointing import reservations
from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint
from raytrainer.checkpointing.places import (
    checkpoint_exists,
    find_checkpoints,
    newest_checkpoint,
    remove_checkpoint,
    written_at,
)
from raytrainer.checkpointing.reservations import release, reserve
from raytrainer.driver.saving import checkpoint_to_resume
from raytrainer.errors import CheckpointError

fcntl = pytest.importorskip("fcntl")

_LOOKS = ("open", "unlink", "rmdir", "mkdir", "replace", "listdir", "scandir", "stat")


def _write(path: Path, epoch: int) -> str:
    write_checkpoint(path, {"epoch": epoch, "state_dict": {"w": torch.full((3,), float(epoch))}})
    return "written"


def _read(path: Path, epoch: int) -> str:
    found = read_checkpoint(path)
    assert found["state_dict"]["w"].tolist() == [found["epoch"]] * 3
    return f"read {found['epoch']}"


def _find(path: Path, epoch: int) -> str:
    assert {found for _, found in find_checkpoints(path.parent)} <= {str(path)}
    return f"found {newest_checkpoint([path.parent])}"


def _look(path: Path, epoch: int) -> str:
    return f"{checkpoint_exists(path)}, {written_at(str(path)) is None}"


def _remove(path: Path, epoch: int) -> str:
    remove_checkpoint(path)
    return "removed"


def _save_under_a_free_name(path: Path, epoch: int) -> str:
    return _write(path, epoch) if reserve(str(path)) else "taken"


def _take_and_give_up(path: Path, epoch: int) -> str:
    if not reserve(str(path)):
        return "taken"
    release(str(path))
    return "released"


_DOES: dict[str, Callable[[Path, int], str]] = {
    "write": _write, "read": _read, "find": _find, "look": _look, "remove": _remove,
    "reserve and write": _save_under_a_free_name, "reserve and release": _take_and_give_up,
}  # fmt: skip

_LOOK_ONLY = {"read", "find", "look"}


def _outcome(does: Callable[[Path, int], str], path: Path, epoch: int) -> str:
    try:
        return does(path, epoch)
    except CheckpointError as error:
        return f"refused: {error}"


class _Moments:
    """Calls `other` once, at the n-th moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left = 0
        self._other: Callable[[], object] | None = None
        for module, names in ((os, _LOOKS), (builtins, ("open",)), (fcntl, ("flock",))):
            for name in names:
                monkeypatch.setattr(module, name, self._watched(getattr(module, name)))

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._other is not None:
                self._left -= 1
                if not self._left:
                    other, self._other = self._other, None
                    other()
            return call(*args, **kwargs)

        return watched

    @contextmanager
    def at(self, moment: int, other: Callable[[], object]) -> Iterator[None]:
        self._left, self._other = moment, other
        try:
            yield
        finally:
            self._other = None


@pytest.mark.parametrize("there", [True, False], ids=["replacing", "new"])
@pytest.mark.parametrize("does", _DOES)
def test_two_drivers_at_one_checkpoint(does: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "_held", {})  # whatever tests before this one have left there
    moments = _Moments(monkeypatch)
    for others in _DOES:
        if {does, others} <= _LOOK_ONLY:
            continue
        moment = 0
        while True:
            moment += 1
            path = tmp_path / f"{others} {moment}" / "x.ckpt"
            path.parent.mkdir()
            if there:
                _write(path, 0)
            seen: list[str] = []

            def other(path: Path = path, seen: list[str] = seen, others: str = others) -> None:
                with monkeypatch.context() as another:  # driver, with reservations of its own
                    another.setattr(reservations, "_held", {})
                    another.setattr(reservations, "_guard", Lock())
                    seen.append(_outcome(_DOES[others], path, 2))
                    assert not reservations._held

            with moments.at(moment, other):
                outcome = _outcome(_DOES[does], path, 1)
            if not seen:
                break  # there are no more moments
            _check(path, {does: outcome}, {others: seen[0]}, there, f"{others!r} at moment {moment} of {does!r}")


def _check(path: Path, first: dict[str, str], second: dict[str, str], there: bool, where: str) -> None:
    said = f"{where}: {first}, then {second}"
    (does, one), (others, two) = *first.items(), *second.items()
    assert not reservations._held, said
    for name, outcome in ((does, one), (others, two)):
        if outcome.startswith("refused"):
            assert (name == "read" and "remove" in (does, others)) or not there, said
        if "write" in name:
            assert outcome in ("written", "taken"), said
    may_be = {1} if one == "written" else set()
    may_be |= {2} if two == "written" else set()
    if not may_be and there:
        may_be = {0}
    try:
        found = read_checkpoint(path)
    except CheckpointError as error:
        assert "no checkpoint there" in str(error), said
        assert "remove" in (does, others) or not may_be, said
        assert not path.exists(), f"{said}: {os.listdir(path)} are left"
    else:
        assert found["epoch"] in may_be and found["state_dict"]["w"].tolist() == [found["epoch"]] * 3, said
        assert len(os.listdir(path)) == 2, f"{said}: {os.listdir(path)}"


def test_the_newest_is_removed_in_favour_of_a_newer_one(
    local_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another driver, between finding it and reading it; one that is damaged is still told of."""
    saving = ModelCheckpoint(tmp_path)
    local_trainer(max_epochs=1, callbacks=saving).fit(Tiny(), data())
    first, reads = Path(saving.best_model_path), checkpoint_to_resume.read_checkpoint

    def read(path: str, **options: Any) -> Any:
        if path == str(first) and first.exists():
            write_checkpoint(tmp_path / "newer.ckpt", reads(path, **options))
            remove_checkpoint(first)
        return reads(path, **options)

    monkeypatch.setattr(checkpoint_to_resume, "read_checkpoint", read)
    trainer = local_trainer(max_epochs=2, callbacks=ModelCheckpoint(tmp_path))
    trainer.fit(Tiny(), data(), ckpt_path="last")
    assert trainer.ckpt_path == f"{tmp_path}/newer.ckpt" and trainer.current_epoch == 2
