"""A worker is lost, or Ctrl-C comes, in the very moment in which a checkpoint is made."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import Exact, Rows, loaders, same

from raytrainer import ModelCheckpoint
from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.driver.loop.coordinator import Coordinator
from raytrainer.driver.saving import checkpoint_writer


class Saved(Exact):
    """Strikes in a worker as its state is gathered, once, when that is done the `turn`th time."""

    def __init__(self, how: str = "", turn: int = 0, flag: str = "") -> None:
        super().__init__(how=how, flag=flag)
        self.turn, self.saves = turn, 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saves += 1
        if self.saves == self.turn and not os.path.exists(self.flag):
            Path(self.flag).touch()
            os.kill(*((os.getpid(), signal.SIGKILL) if self.how == "kill" else (os.getppid(), signal.SIGINT)))


class Runs:
    """Fits with two savers; the other places where it strikes are the driver's.

    Attributes:
        strike: What happens after the copying of a state, or as it is written, in turn number `turn`.
    """

    def __init__(self, forked: Any, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forked, self.strategy = forked, strategy
        self.where, self.turn, self.strike = "", 0, lambda: None
        for where, owner, name in (
            ("copied", Coordinator, "capture"),
            ("written", checkpoint_writer, "write_checkpoint"),
        ):
            monkeypatch.setattr(owner, name, self.striking(where, getattr(owner, name)))

    def striking(self, where: str, action: Any) -> Any:
        def act(*args: Any, **kwargs: Any) -> Any:
            self.turn -= where == self.where
            if where == self.where and self.turn == 0:
                self.strike()
            return action(*args, **kwargs)

        return act

    def fit(self, module: Exact, folder: Path, **options: Any) -> tuple[Any, list[Any]]:
        logger = Rows()
        savers = [
            ModelCheckpoint(folder / "best", monitor="val_loss", save_top_k=2, save_last=True),
            ModelCheckpoint(folder / "steps", filename="{step}", every_n_train_steps=3, save_top_k=-1),
        ]
        trainer = self.forked(
            strategy=self.strategy, max_epochs=3, seed=5, accumulate_grad_batches=2, val_check_interval=0.5,
            log_every_n_steps=2, logger=logger, callbacks=savers, default_root_dir=folder, enable_checkpointing=True,
        )  # fmt: skip
        trainer.fit(module, *loaders(), **options)
        return trainer, logger.rows


def files(folder: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    found = {path.relative_to(folder).as_posix(): read_checkpoint(path) for path in sorted(folder.rglob("*.ckpt"))}
    return {name: (state["global_step"], state["state_dict"]) for name, state in found.items()}


def equal(found: Any, expected: Any) -> bool:
    return found.keys() == expected.keys() and all(
        step == expected[name][0] and all(torch.equal(value, expected[name][1][key]) for key, value in weights.items())
        for name, (step, weights) in found.items()
    )


@pytest.fixture
def save(forked: Any, forked_groups: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return lambda *member: strike_in(Runs(forked, member[0], monkeypatch), forked_groups, tmp_path, *member[1:])


def strike_in(runs: Runs, groups: Any, tmp_path: Path, how: str, where: str, turn: int) -> None:
    """Nothing else changes, here or in the run that goes on after Ctrl-C."""
    calm = Saved()
    _, rows = runs.fit(calm, tmp_path / "calm")

    def strike() -> None:
        if how == "kill":
            os.kill(groups.take(2).pids[1], signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGINT)

    runs.where, runs.turn, runs.strike = where, turn, strike
    module = Saved(how, turn if where == "gathered" else 0, f"{tmp_path}/flag")
    trainer, found = runs.fit(module, tmp_path / "struck")
    assert trainer.interrupted == (how == "interrupt") and len(trainer.recoveries) == (how == "kill")
    if how == "interrupt":
        module = Saved()
        runs.fit(module, tmp_path / "struck", ckpt_path="last")
    else:
        assert found == rows
    assert same(module, calm)
    expected, saved = files(tmp_path / "calm"), files(tmp_path / "struck")
    for step in (3, 9):  # what was due where another state is gone on from comes a little later
        if (late := f"steps/step={step + 1}.ckpt") in saved:
            del saved[late], expected[f"steps/step={step}.ckpt"]
    assert equal(saved, expected)


@pytest.mark.sample(1)
@pytest.mark.parametrize("turn", [3, 5, 8])
@pytest.mark.parametrize("where", ["gathered", "copied", "written"])
@pytest.mark.parametrize("how", ["kill", "interrupt"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_in_a_save(strategy, how, where, turn, save):
    save(strategy, how, where, turn)


def test_a_second_saver_is_still_owed_its_checkpoint(save):
    """The run goes on from what the first one has saved in that very moment."""
    save("ddp", "kill", "gathered", 5)
