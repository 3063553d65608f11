"""A checkpoint that a run begins with leaves the driver's memory when workers have it."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import Exact, Mortal, run, same
from tiny import Tiny, data

from raytrainer import Callback, ModelCheckpoint, Trainer
from raytrainer.driver.saving import checkpoint_to_resume
from raytrainer.driver.saving.beginning import Beginning
from raytrainer.driver.saving.checkpoint_to_resume import read_to_resume
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.errors import CheckpointError


def test_what_can_be_read_anew_is_let_go() -> None:
    reads: list[int] = []
    beginning = Beginning({"step": 1}, lambda: reads.append(1) or {"step": 1})  # type: ignore[func-returns-value]
    assert beginning.state == {"step": 1} and not reads
    beginning.taken_up(for_good=False)
    assert beginning.state == {"step": 1} and reads
    kept = Beginning({"step": 2})
    kept.taken_up(for_good=False)
    assert kept.state == {"step": 2}


class Edits(Callback):
    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["edited"] = True


class Watches(Callback):
    """Whether what was read is alive while the run trains, or evaluates."""

    def __init__(self, marks: list[weakref.ref[Any]]) -> None:
        self.marks, self.alive = marks, list[bool]()

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.alive += [mark() is not None for mark in self.marks]

    on_validation_end = on_train_epoch_start


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = str(tmp_path / "x.ckpt")
    trainer = Trainer(strategy="local", max_epochs=1, logger=False, default_root_dir=tmp_path)
    trainer.fit(Tiny(), data())
    trainer.save_checkpoint(path, wait=True)
    return path


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_it_is_gone_while_the_run_goes_on(
    verb: str, saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks: list[weakref.ref[Any]] = []
    read = checkpoint_to_resume.read_checkpoint

    def marked(*args: Any, **options: Any) -> dict[str, Any]:
        mark = torch.ones(1)
        marks.append(weakref.ref(mark))
        return {**read(*args, **options), "mark": mark}

    monkeypatch.setattr(checkpoint_to_resume, "read_checkpoint", marked)
    watches = Watches(marks)
    options = {"logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = Trainer(strategy="local", max_epochs=2, callbacks=[watches, Edits()], **options)
    getattr(trainer, verb)(Tiny(), data(), ckpt_path=saved)
    assert watches.alive and not any(watches.alive)


@pytest.mark.parametrize(("callbacks", "anew"), [([], True), ([ModelCheckpoint()], True), ([Edits()], False)])
def test_what_hooks_edit_is_kept_for_workers_in_place_of_lost_ones(callbacks: Any, anew: bool, saved: str) -> None:
    beginning = read_to_resume(saved, callbacks, [], "")
    assert beginning is not None
    beginning.state["edited"] = True
    beginning.taken_up(for_good=False)
    assert ("edited" in beginning.state) != anew
    assert beginning.state["global_step"] == 10


@pytest.mark.parametrize("fate", ["is there", "is gone", "is weights alone"])
def test_workers_that_are_lost_before_a_snapshot(fate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others begin with the same checkpoint, read anew; where that cannot be, the run says so."""
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Mortal())
    calm = Exact()
    run(calm, tmp_path / "calm")
    run(Exact(), tmp_path, save_every=4, max_steps=9)
    path, module = tmp_path / "last.ckpt", Exact((0, 23), flag=f"{tmp_path}/flag")

    class Acts(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            if fate != "is there":
                shutil.rmtree(path)
            if fate == "is weights alone":
                trainer.save_checkpoint(path, weights_only=True)

    options: dict[str, Any] = {"ckpt_path": str(path), "snapshot_every": 1000, "callbacks": [Acts()]}
    if fate == "is there":
        trainer, _ = run(module, tmp_path, **options)
        assert len(trainer.recoveries) == 1 and same(module, calm)
    else:
        with pytest.raises(CheckpointError, match="before there was a snapshot, and the checkpoint that"):
            run(module, tmp_path, **options)
