"""Runs that go on with those of their workers that are left."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from exact import Died, Exact, Mortal, run, same

from raytrainer.driver.loop import recovery
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.plan.recoveries import Continuity


class Supply:
    """Groups as if of another process, which can be mended; what has been asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mends: bool = True) -> None:
        self.calls: list[str] = []
        self.spares: list[int] = []
        supply = self

        class Group(Mortal):
            def abort(self) -> None:
                supply.calls.append("abort")
                super().abort()

            def mended(self) -> Any:
                supply.calls.append("mend")
                if not mends:
                    return None
                group = Group()
                group.continuity = Continuity(0, 1)
                return group

            def keep_spares(self, count: int) -> None:
                supply.spares.append(count)

        def take(own: Any, settings: Any) -> Any:
            supply.calls.append("take")
            return Group()

        monkeypatch.setattr(GroupSupply, "take", take)


class DiesAgain(Exact):
    """Once more before it goes on, which leaves a flag too."""

    def on_train_start(self) -> None:
        again = f"{self.flag}-again"
        if os.path.exists(self.flag) and not os.path.exists(again):
            Path(again).touch()
            raise Died


@pytest.mark.parametrize(
    ("kind", "mends", "calls"),
    [
        (Exact, True, ["take", "mend"]),
        (Exact, False, ["take", "mend", "abort", "take"]),
        # what has been mended and is lost again before it goes on is not mended a second time
        (DiesAgain, True, ["take", "mend", "abort", "take"]),
    ],
)
def test_lost_workers_change_nothing(kind, mends, calls, monkeypatch, tmp_path):
    calm, module, supply = Exact(), kind((0, 9), flag=f"{tmp_path}/flag"), Supply(monkeypatch, mends)
    _, rows = run(calm, tmp_path, snapshot_every=4)
    assert supply.calls == ["take"]
    supply.calls.clear()
    trainer, struck_rows = run(module, tmp_path, snapshot_every=4)
    assert [call for call in supply.calls if call != "abort"] == [call for call in calls if call != "abort"]
    assert ("abort" in supply.calls) == ("abort" in calls)
    assert same(module, calm) and struck_rows == rows
    (found,) = trainer.recoveries
    assert (found.kept, found.spares) == ((0, 1) if calls[-1] == "mend" else (0, 0))
    assert ("1 spare" if calls[-1] == "mend" else "1 new") in str(found)


@pytest.mark.parametrize(
    ("options", "after", "asked"),
    [
        ({"spares": 0}, math.inf, {0}),
        ({"spares": 2}, math.inf, {2}),
        ({"spares": "auto"}, math.inf, set()),
        ({}, 0.0, {1}),
        ({"spares": 2, "max_failures": 0}, 0.0, set()),
    ],
)
def test_as_many_spares_as_asked_for(options, after, asked, monkeypatch, tmp_path):
    monkeypatch.setattr(recovery, "AUTO_AFTER", after)
    supply = Supply(monkeypatch)
    run(Exact(), tmp_path, max_epochs=1, **options)
    assert set(supply.spares) == asked
