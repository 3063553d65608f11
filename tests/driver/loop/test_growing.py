"""Runs that try for more workers, and runs that lose a state."""

from __future__ import annotations

from typing import Any

import pytest
from exact import Exact, Mortal, run, same

import raytrainer
from raytrainer.driver.cluster.placement_rules import additions
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.errors import StateLostError, WorkerLostError


@pytest.fixture
def calm(tmp_path):
    module = Exact()
    run(module, tmp_path)
    return module


class Supply:
    """Groups as if of another process, and what has been asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, grows: str = "", lasting: bool = True) -> None:
        self.grows, self.taken, self.asked, self.aborted = grows, 0, 0, 0
        supply = self

        class Group(Mortal):
            def abort(self) -> None:
                supply.aborted += 1
                super().abort()

        self.make: Any = Group
        monkeypatch.setattr(GroupSupply, "take", lambda own, settings: self.take())
        monkeypatch.setattr(GroupSupply, "grow", lambda own, settings, group, ready: self.grow(group, ready))
        monkeypatch.setattr(GroupSupply, "can_grow", lambda own, settings, group: lasting or self.asked == 0)

    def take(self) -> Any:
        self.taken += 1
        return self.make()

    def grow(self, group: Any, ready: Any) -> Any:
        self.asked += 1
        if self.grows == "not":
            return None
        ready()
        group.abort()
        if self.grows == "lost":
            raise WorkerLostError(1, "the new node is no good")
        return self.make()


@pytest.mark.parametrize("grows", ["", "lost"])
def test_nothing_is_lost_with_workers_that_were_to_be_added(grows, calm, monkeypatch, tmp_path):
    """A new worker may die at its start: that is a failure like any other."""
    supply, module = Supply(monkeypatch, grows, lasting=False), Exact()
    trainer, _ = run(module, tmp_path, snapshot_every=4)
    assert same(module, calm)
    assert (supply.asked, supply.taken) == (1, 2 if grows else 1)
    assert [r.replayed_batches for r in trainer.recoveries] == ([0] if grows else [])


def test_workers_that_are_well_stay_where_no_more_come(calm, monkeypatch, tmp_path):
    """And it is tried once an epoch."""
    supply, module = Supply(monkeypatch, "not"), Exact()
    trainer, _ = run(module, tmp_path)
    assert same(module, calm)
    assert (supply.asked, supply.taken, supply.aborted) == (2, 1, 0)
    assert trainer.recoveries == []


@pytest.mark.parametrize(
    ("nodes", "per_node", "free", "held", "expected"),
    [
        (1, 2, {"a": 1}, {"a": 1}, {"a": (1, 1)}),
        (1, 2, {"a": 0}, {"a": 1}, None),
        (2, 1, {"a": 0, "b": 1}, {"a": 1}, {"a": (1, 0), "b": (0, 1)}),
        (2, 2, {"a": 1, "b": 2}, {"a": 1}, {"a": (1, 1), "b": (0, 2)}),
        (2, 2, {"a": 1, "b": 1}, {"a": 1}, None),
        (2, 2, {"a": 0, "b": 2}, {"a": 3}, {"a": (2, 0), "b": (0, 2)}),
        (1, 3, {"a": 3, "b": 2}, {"b": 1}, {"b": (1, 2)}),  # fewer are added there
        (2, 1, {"a": 0, "b": 0, "c": 1}, {"a": 1}, {"a": (1, 0), "c": (0, 1)}),
    ],
)
def test_where_workers_are_added(nodes, per_node, free, held, expected):
    assert additions(nodes, per_node, free, held) == expected


@pytest.mark.parametrize("on", ["main thread", "writer"])
def test_a_lost_state_is_a_lost_worker(on, calm, monkeypatch, tmp_path):
    """Whichever thread finds that out."""
    supply, losses = Supply(monkeypatch, lasting=False), []
    monkeypatch.setattr(GroupSupply, "can_grow", lambda *args: False)

    class Loses(supply.make):
        def capture(self, weights_only: bool = False, final: bool = False) -> Any:
            fetch = super().capture(weights_only, final)
            state = fetch()
            if losses or supply.taken > 1:
                return lambda: state
            losses.append(self)

            def lost() -> Any:
                raise StateLostError("all copies of the state are gone", lambda: False)

            return lost

    supply.make = Loses

    class Looks(raytrainer.Callback):
        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["looked"] = True

    module = Exact()
    callbacks = [Looks()] if on == "main thread" else []
    saver = raytrainer.ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, save_top_k=-1)
    trainer = raytrainer.Trainer(
        strategy="local", max_epochs=3, seed=5, accumulate_grad_batches=2, gradient_clip_val=1.0,
        val_check_interval=0.5, enable_progress_bar=False, enable_model_summary=False, logger=False,
        callbacks=[*callbacks, saver],
    )  # fmt: skip
    from exact import loaders

    trainer.fit(module, *loaders())
    assert same(module, calm)
    (recovery,) = trainer.recoveries
    assert "all copies of the state are gone" in recovery.error and supply.taken == 2
