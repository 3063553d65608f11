"""Workers lost before a run's first step, from the start of their processes on, and when all is trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from exact import Exact, Mortal, run, same
from tiny import Clock

import raytrainer
from raytrainer.driver.run import LONGEST_START
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.driver.workers.worker_group import Copies
from raytrainer.errors import ConfigurationError, WorkerLostError


class Starts:
    """Groups of which the first ones fail while they start.

    Attributes:
        fail: What they fail of, in order.
        taken: How many have been asked for.
    """

    def __init__(self, *fail: Exception) -> None:
        self.fail, self.taken = list(fail), 0

    def take(self, supply: Any, settings: Any, sizes: Any = ()) -> Any:
        self.taken += 1
        if self.fail:
            raise self.fail.pop(0)
        return Mortal()


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Starts:
    starts = Starts()
    monkeypatch.setattr(GroupSupply, "prepare", lambda supply, settings: None)
    monkeypatch.setattr(GroupSupply, "take", lambda supply, *args: starts.take(supply, *args))
    monkeypatch.setattr(GroupSupply, "give_back", lambda supply, group: None)
    return starts


def lost(could_start: bool = True, unreachable: bool = False) -> WorkerLostError:
    return WorkerLostError(1, "killed while it imported", could_start, unreachable)


@pytest.mark.parametrize("losses", [1, 2])
@pytest.mark.parametrize("die", [None, (0, 0), (0, 9)])
def test_lost_while_the_first_workers_start(die: Any, losses: int, starts: Starts, tmp_path: Path) -> None:
    """They count like others, and are told as others are."""
    calm = Exact()
    _, rows = run(calm, tmp_path)
    starts.fail, starts.taken = [lost() for _ in range(losses)], 0
    module, allowed = Exact(die, flag=f"{tmp_path}/flag"), losses + (die is not None)
    trainer, struck_rows = run(module, tmp_path, max_failures=allowed)
    assert same(module, calm) and struck_rows == rows
    assert starts.taken == 1 + allowed
    first = trainer.recoveries[0]
    assert "killed while it imported" in first.error and first.source == "the run's beginning"
    assert (first.step, first.resumed_step, first.replayed_batches, first.kept) == (0, 0, 0, 0)
    assert len(trainer.recoveries) == 1 + (die is not None)


@pytest.mark.parametrize(
    ("fail", "allowed", "taken"),
    [
        ([lost(), lost(), lost()], 2, 3),
        ([lost()], 0, 1),
        ([lost(could_start=False), lost()], 3, 1),  # a package that the node lacks is not there a moment later
        # by a wrong interface, say, nobody being lost
        ([lost(unreachable=True), lost(unreachable=True), lost()], 3, 2),
        ([lost(unreachable=True), lost(), lost(unreachable=True), lost()], 3, 3),
        ([ConfigurationError("mine")], 3, 1),
        ([ValueError("mine")], 3, 1),
    ],
)
def test_what_ends_the_run_while_they_start(
    fail: Any, allowed: int, taken: int, starts: Starts, tmp_path: Path
) -> None:
    starts.fail = list(fail)
    with pytest.raises(type(fail[0])) as caught:
        run(Exact(), tmp_path, max_failures=allowed)
    assert caught.value is fail[taken - 1] and starts.taken == taken


def test_a_start_that_has_taken_long_is_not_repeated(
    starts: Starts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that cannot reach each other answer nothing, for half an hour each time."""
    clock, take = Clock(0.0), starts.take

    def later(*args: Any) -> Any:
        clock.now += LONGEST_START * 0.6
        return take(*args)

    monkeypatch.setattr("raytrainer.driver.run.time", clock)
    monkeypatch.setattr(starts, "take", later)
    starts.fail = [lost() for _ in range(4)]
    with pytest.raises(WorkerLostError):
        run(Exact(), tmp_path, max_failures=3)
    assert starts.taken == 2


def test_those_of_the_start_count_later(starts: Starts, tmp_path: Path) -> None:
    starts.fail = [lost()]
    with pytest.raises(WorkerLostError, match="is lost"):
        run(Exact((0, 9), flag=f"{tmp_path}/flag"), tmp_path, max_failures=1)
    assert starts.taken == 2


def test_where_nothing_is_trained_a_loss_ends_it(starts: Starts, tmp_path: Path) -> None:
    starts.fail = [lost()]
    with pytest.raises(WorkerLostError):
        raytrainer.Trainer(strategy="local", logger=False, enable_progress_bar=False).validate(Exact(), [])
    assert starts.taken == 1


class Counts(raytrainer.Callback):
    """Has a state from `setup` on, which hooks change that are called once, and others."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.seen = ["setup"]

    def add(self, hook: str) -> None:
        self.seen.append(hook)

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.add("on_fit_start")

    def on_sanity_check_end(self, trainer: Any, module: Any) -> None:
        self.add("on_sanity_check_end")

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.add("on_train_start")

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.add("on_train_epoch_start")

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.add("on_train_end")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class DiesAtTheEnd(Exact):
    def on_train_end(self) -> None:
        self.perish_if_due("on_train_end")


def trained(module: Exact, folder: Path, **options: Any) -> tuple[Any, Any, list[str], dict[str, Any], list[str]]:
    """Once, with checkpoints; what callbacks end with, and which files there are."""
    counts = Counts()
    saver = raytrainer.ModelCheckpoint(monitor="val_loss", save_last=True)
    trainer, rows = run(module, folder, callbacks=[counts, saver], default_root_dir=folder, **options)
    state = {name: value for name, value in saver.state_dict().items() if name != "dirpath"}
    state = {name: str(value).replace(str(folder), "") for name, value in state.items()}
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.ckpt"))
    return trainer, rows, counts.seen, state, files


@pytest.mark.parametrize(
    ("batches", "verb", "source"),
    [
        (0, "validate", "the run's beginning"),  # in the sanity check
        (0, "train", "the run's beginning"),
        (5, "train", "the run's beginning"),
        (42, "on_train_end", "a snapshot"),
    ],
)
def test_what_hooks_of_a_whole_run_leave_in_callbacks(
    batches: int, verb: str, source: str, starts: Starts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are not called again, so whoever begins again has what they have left: also where to save to."""
    _, rows, seen, state, files = trained(Exact(), tmp_path / "calm")
    module = DiesAtTheEnd((0, batches), flag=f"{tmp_path}/flag", verb=verb)
    trainer, struck_rows, *struck = trained(module, tmp_path / "struck")
    assert os.path.exists(module.flag)
    assert (struck_rows, *struck) == (rows, seen, state, files)
    assert [found.source for found in trainer.recoveries] == [source]
    assert "the folder changed" not in caplog.text


def test_lost_in_a_hook_that_saves_when_all_is_trained(
    starts: Starts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is called again, since it has not come to its end."""
    _, rows, seen, state, files = trained(Exact(), tmp_path / "calm")
    capture = Mortal.capture

    def once(group: Any, *args: Any, **kwargs: Any) -> Copies:
        if int(group.worker._run.module.batches) == 42 and starts.taken == 2 and at_end:
            at_end.clear()
            raise lost()
        return capture(group, *args, **kwargs)

    at_end: list[bool] = []
    monkeypatch.setattr(Mortal, "capture", once)
    end = raytrainer.ModelCheckpoint.on_train_end
    monkeypatch.setattr(raytrainer.ModelCheckpoint, "on_train_end", lambda *args: (at_end.append(True), end(*args))[1])
    trainer, struck_rows, *struck = trained(Exact(), tmp_path / "struck")
    assert len(trainer.recoveries) == 1
    assert (struck_rows, *struck) == (rows, seen, state, files)
