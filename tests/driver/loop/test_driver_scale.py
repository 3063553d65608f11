"""The benchmark of the driver with many workers: its simulated group is one that a `fit` can use, losses included."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from raytrainer.driver.workers.group_supply import GroupSupply


@pytest.mark.parametrize("lose", [False, True])
def test_simulated_workers_go_through_a_fit(lose, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("prepare", "give_back", "leaving", "take"):  # which the script sets, and leaves so
        monkeypatch.setattr(GroupSupply, name, getattr(GroupSupply, name))
    import driver_scale

    monkeypatch.delitem(sys.modules, "driver_scale")
    watch, trainer = driver_scale.run(3, [25], lose)
    assert 0 <= trainer.global_step - 25 * driver_scale.CHUNK < driver_scale.CHUNK
    assert 25 in watch.mebibytes and watch.plain and watch.ends
    assert [found.workers for found in trainer.recoveries] == [3] * lose
    assert trainer.callback_metrics["metric_0"] > 0
