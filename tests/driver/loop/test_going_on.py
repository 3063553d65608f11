"""Runs that go on after a loss: hooks that begin and end a run or an epoch have their effects once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import Died, Exact, Mortal, run, same

from raytrainer import Callback
from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.driver.workers.group_supply import GroupSupply


@pytest.fixture(autouse=True)
def mortal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupSupply, "prepare", lambda supply, settings: None)
    monkeypatch.setattr(GroupSupply, "take", lambda supply, settings, sizes=(): Mortal())
    monkeypatch.setattr(GroupSupply, "give_back", lambda supply, group: None)


class Hooked(Exact):
    """With one hook that changes weights, a number and a table; dies once more at the same batch."""

    def __init__(self, hook: str, die: tuple[int, int] | None = None, flag: str = "", verb: str = "train") -> None:
        super().__init__(die, flag=flag, verb=verb)
        self.hook, self.count, self.table = hook, 0, torch.ones(3)

    def act(self, hook: str) -> None:
        if hook == self.hook:
            self.count += 1
            self.table = self.table * 1.5
            with torch.no_grad():
                self.net[0].weight.mul_(1.1)
        self.perish_if_due(hook)

    def on_fit_start(self) -> None:
        self.act("on_fit_start")

    def on_train_start(self) -> None:
        self.act("on_train_start")

    def on_train_epoch_start(self) -> None:
        self.act("on_train_epoch_start")

    def on_train_epoch_end(self) -> None:
        self.act("on_train_epoch_end")

    def on_train_end(self) -> None:
        self.act("on_train_end")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if (
            self.die == (0, int(self.batches))
            and os.path.exists(self.flag)
            and not os.path.exists(f"{self.flag}-again")
        ):
            Path(f"{self.flag}-again").touch()
            raise Died
        return super().training_step(batch, batch_idx) * (1 + 0.1 * self.count) * self.table.mean()


class Saves(Callback):
    """Saves in one hook. Each file counts as a snapshot, too."""

    def __init__(self, hook: str, folder: Path) -> None:
        self.folder, self.count = folder, 0
        setattr(self, hook, self.save)

    def save(self, trainer: Any, module: Any) -> None:
        self.count += 1
        trainer.save_checkpoint(self.folder / f"{self.count}.ckpt")


def trained(module: Hooked, folder: Path, saves: str, every: int | None) -> Any:
    callback = Saves(saves, folder)
    trainer, rows = run(module, folder, callbacks=[callback], max_failures=3, snapshot_every=every)
    return trainer, rows, read_checkpoint(folder / f"{callback.count}.ckpt")


@pytest.mark.sample(8)
@pytest.mark.parametrize("die", [2, 14, 15, 17])
@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("saves", ["on_train_epoch_start", "on_train_epoch_end"])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_epoch_end"])
def test_within_an_epoch(hook: str, saves: str, every: int | None, die: int, tmp_path: Path) -> None:
    calm, struck = Hooked(hook), Hooked(hook, (0, die), f"{tmp_path}/flag")
    _, rows, saved = trained(calm, tmp_path / "calm", saves, every)
    trainer, struck_rows, struck_saved = trained(struck, tmp_path / "struck", saves, every)
    assert len(trainer.recoveries) == 2 and same(calm, struck) and rows == struck_rows
    assert all(map(torch.equal, saved["state_dict"].values(), struck_saved["state_dict"].values()))


@pytest.mark.parametrize("verb", ["on_train_epoch_end", "on_train_end"])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_end"])
def test_at_the_end(hook: str, verb: str, tmp_path: Path) -> None:
    """When all is trained, and saved or not."""
    calm, struck = Hooked(hook), Hooked(hook, (0, 42), f"{tmp_path}/flag", verb)
    rows = trained(calm, tmp_path / "calm", "on_train_epoch_end", None)[1]
    trainer, struck_rows, _ = trained(struck, tmp_path / "struck", "on_train_epoch_end", None)
    assert len(trainer.recoveries) == 1 and same(calm, struck) and rows == struck_rows
