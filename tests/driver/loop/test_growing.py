"""Runs that try for more workers, and runs that lose a state."""

from __future__ import annotations

from typing import Any

import pytest
from exact import Exact, Mortal, run, same

import raytrainer
from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.driver.cluster.placement_rules import additions
from raytrainer.driver.loop import resizing
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.driver.workers.worker_group import Copies
from raytrainer.errors import ResourceError, StateLostError, WorkerLostError


@pytest.fixture
def calm(tmp_path):
    module = Exact()
    run(module, tmp_path)
    return module


class Places:
    """Room for further workers; it is sure that they start there once it has been looked at so often."""

    def __init__(self, looks: int) -> None:
        self.looks, self.given_back = looks, 0

    def sure(self) -> bool:
        if self.looks < 0:
            raise ResourceError("no torch there")
        self.looks -= 1
        return self.looks < 0

    def give_back(self) -> None:
        self.given_back += 1


class Supply:
    """Groups as if of another process, and what has been asked of them.

    Args:
        monkeypatch: Puts it in place of the real one.
        grows: "": there is more room; "not": not when it is asked for; "broken": but no worker starts there; "lost": a
            new worker dies at once.
        looks: After how many looks new workers have started.
        lasting: There seems to be room still after it has been asked for.
        leaving: Seconds that the present node has left; None: it stays.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, grows: str = "", looks: int = 0, lasting: bool = True,
        leaving: float | None = None, sizes: tuple[int, ...] = (1,),
    ) -> None:  # fmt: skip
        self.grows, self.taken, self.asked, self.aborted = grows, 0, 0, 0
        self.places = Places(-1 if grows == "broken" else looks)
        self.elsewhere: list[tuple[int, ...]] = []
        supply = self

        class Group(Mortal):
            def abort(self) -> None:
                supply.aborted += 1
                super().abort()

        self.make: Any = Group

        def more_places(own: Any, settings: Any, group: Any) -> Places | None:
            self.asked += 1
            return None if grows == "not" else self.places

        def nodes(own: Any, group: Any) -> dict[str, float]:
            return {"node": leaving} if leaving is not None and self.taken == 1 else {}

        monkeypatch.setattr(resizing, "LOOK_EVERY", 0.0)
        monkeypatch.setattr(GroupSupply, "take", lambda own, *args: self.take(*args))
        monkeypatch.setattr(GroupSupply, "more_places", more_places)
        monkeypatch.setattr(GroupSupply, "grow", lambda own, group, places: self.grow(group))
        monkeypatch.setattr(GroupSupply, "can_grow", lambda *args: bool(looks >= 0 and (lasting or not self.asked)))
        monkeypatch.setattr(GroupSupply, "leaving", nodes)
        monkeypatch.setattr(GroupSupply, "elsewhere", lambda *args: list(sizes))

    def take(self, settings: Any, sizes: Any = ()) -> Any:
        self.taken += 1
        self.elsewhere.append(tuple(sizes))
        return self.make()

    def grow(self, group: Any) -> Any:
        group.abort()
        if self.grows == "lost":
            raise WorkerLostError(1, "the new node is no good")
        return self.make()


@pytest.mark.parametrize("looks", [0, 3])
@pytest.mark.parametrize("grows", ["", "lost"])
def test_nothing_is_lost_with_workers_that_were_to_be_added(grows, looks, calm, monkeypatch, tmp_path):
    """They come within the epoch, between two steps. One may die at its start: that is a failure like any other."""
    supply, module = Supply(monkeypatch, grows, looks, lasting=False), Exact()
    trainer, _ = run(module, tmp_path, snapshot_every=4)
    assert same(module, calm)
    assert (supply.asked, supply.taken) == (1, 2 if grows else 1)
    assert [r.replayed_batches for r in trainer.recoveries] == ([0] if grows else [])


@pytest.mark.parametrize("grows", ["not", "broken"])
def test_workers_that_are_well_stay_where_no_more_come(grows, calm, monkeypatch, tmp_path, caplog):
    """And it is not tried again at once."""
    caplog.set_level("WARNING", logger="raytrainer")
    supply, module = Supply(monkeypatch, grows), Exact()
    trainer, _ = run(module, tmp_path)
    assert same(module, calm)
    assert (supply.asked, supply.taken, supply.aborted) == (1, 1, 0)
    assert supply.places.given_back == ("no torch there" in caplog.text) == (grows == "broken")
    assert trainer.recoveries == []


def test_places_that_nobody_has_taken_are_given_back(calm, monkeypatch, tmp_path):
    supply, module = Supply(monkeypatch, looks=10**6), Exact()
    run(module, tmp_path)
    assert same(module, calm) and supply.places.given_back == 1 and supply.aborted == 0


@pytest.mark.parametrize(
    ("left", "sizes", "moves"),
    [
        (100.0, (1,), True),  # there is room elsewhere
        (100.0, (), False),  # there is not, and time enough
        (5.0, (), True),  # nor is there time: whatever comes
    ],
)
def test_nodes_that_are_to_go_are_left_before(left, sizes, moves, calm, monkeypatch, tmp_path, caplog):
    caplog.set_level("WARNING", logger="raytrainer")
    supply, module = Supply(monkeypatch, looks=-1, leaving=left, sizes=sizes), Exact()
    trainer, _ = run(module, tmp_path)
    assert same(module, calm)
    assert supply.elsewhere == ([(), sizes] if moves else [()]) and supply.aborted == moves
    assert caplog.text.count("Ray is to give back node(s) node") == 1
    assert [(r.replayed_batches, r.step - r.resumed_step) for r in trainer.recoveries] == [(0, 0)] * moves


def test_without_any_room_the_step_is_saved(monkeypatch, tmp_path):
    """Another run goes on from there."""
    supply = Supply(monkeypatch, looks=-1, leaving=5.0, sizes=())
    take = supply.take

    def none(settings: Any, sizes: Any = ()) -> Any:
        if supply.taken:
            raise ResourceError("not to be had")
        return take(settings)

    monkeypatch.setattr(GroupSupply, "take", lambda own, *args: none(*args))
    saver = raytrainer.ModelCheckpoint(tmp_path / "kept", every_n_epochs=100)
    with pytest.raises(ResourceError):
        run(Exact(), tmp_path, callbacks=[saver])
    assert read_checkpoint(tmp_path / "kept" / "preempted.ckpt")["global_step"] > 0


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
    supply, losses = Supply(monkeypatch, looks=-1), []

    class Loses(supply.make):
        def capture(self, weights_only: bool = False, final: bool = False) -> Any:
            state = super().capture(weights_only, final).fetch()
            if losses or supply.taken > 1:
                return Copies(lambda: state)
            losses.append(self)

            def lost() -> Any:
                raise StateLostError("all copies of the state are gone", lambda: False)

            return Copies(lost)

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
