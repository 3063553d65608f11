"""Where main memory has room for one state, or two: what goes, who waits, and where a run goes on that has none."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
from exact import Exact, Mortal, run, same

from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.driver.workers.worker_group import Copies, Room
from raytrainer.errors import WorkerLostError


class Lease:
    """As long as it is there, so is a state."""


class Narrow(Mortal):
    """Has room for so many states; loses its worker as one is copied."""

    states: ClassVar[int] = 1
    dies_at: ClassVar[int] = 0
    captured: ClassVar[int] = 0
    held: ClassVar[list[Any]] = []
    most: ClassVar[int] = 0

    def room(self, weights_only: bool) -> Room:
        alive = sum(lease() is not None for lease in self.held)
        return Room(alive < self.states, single=self.states == 1 and not weights_only)

    def capture(self, weights_only: bool = False, final: bool = False) -> Copies:
        kind = type(self)
        kind.captured += 1
        if kind.captured == self.dies_at:
            raise WorkerLostError(0, "is lost as its state is copied")
        copies, lease = super().capture(weights_only, final), Lease()
        kind.held = [*(held for held in self.held if held() is not None), weakref.ref(lease)]
        kind.most = max(self.most, len(kind.held))

        def fetch() -> Any:
            assert lease is not None
            return copies.fetch()

        return Copies(fetch)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> type[Narrow]:
    class Own(Narrow):
        pass

    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Own())
    return Own


@pytest.mark.parametrize(("states", "save_every", "loses"), [(1, 6, 5), (1, 0, 21), (2, 0, 3), (2, 6, 3)])
def test_a_worker_lost_as_its_state_is_copied(
    narrow: type[Narrow], states: int, save_every: int, loses: int, tmp_path: Path
) -> None:
    """With one state, the run goes on from the newest checkpoint, or from the start; with two, from the other one."""
    calm, module = Exact(), Exact()
    narrow.states = states
    folder = tmp_path / "calm"
    _, rows = run(calm, folder, snapshot_every=3, save_every=save_every)
    assert 0 < narrow.most <= states
    narrow.captured, narrow.dies_at, narrow.held, narrow.most = 0, narrow.captured - 1, [], 0
    trainer, struck_rows = run(module, tmp_path / "struck", snapshot_every=3, save_every=save_every)
    assert same(module, calm) and struck_rows == rows
    (recovery,) = trainer.recoveries
    assert recovery.step - recovery.resumed_step <= loses
    assert narrow.most <= states
    if states == 1:
        assert (recovery.resumed_step > 0) == bool(save_every)


def test_who_holds_states_does_not_keep_a_run_from_going_on(narrow: type[Narrow], tmp_path: Path) -> None:
    """Once nothing is being written, nobody is waited for."""
    import raytrainer

    class Keeps(raytrainer.Callback):
        every_n_train_steps = 2

        def __init__(self) -> None:
            self.captured: list[Any] = []

        def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
            self.captured.append(trainer._run.coordinator.capture())

    run(Exact(), tmp_path, snapshot_every=3, callbacks=[keeps := Keeps()], max_epochs=1)
    assert narrow.most >= len(keeps.captured) > 2
