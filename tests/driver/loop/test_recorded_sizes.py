"""What workers have recorded is for as many workers: where others go on, it is the newest snapshot that serves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raytrainer.driver.loop.recovery import WorkerRecovery
from raytrainer.driver.saving.recorded_state import RecordedState
from raytrainer.driver.saving.snapshots import Snapshots


@pytest.mark.parametrize(("size", "goes_on_from"), [(2, "recorded"), (1, "snapshot"), (3, "snapshot")])
def test_a_second_loss_leaves_another_number_of_workers(size: int, goes_on_from: str) -> None:
    settings: Any = SimpleNamespace(max_failures=3, snapshot_every=1, spares=0)
    snapshots = Snapshots(settings, enabled=True)
    snapshots.latest = lambda: {"from": "snapshot"}  # type: ignore[method-assign]
    found = [RecordedState({"from": "recorded"}, [SimpleNamespace(batch=3)] * 2), None]  # type: ignore[list-item]
    capture: Any = SimpleNamespace(recorded=lambda group: found.pop(0), restore=lambda state: None)
    services: Any = SimpleNamespace(callback_states=dict, restore_callbacks=lambda states: None)
    recovery = WorkerRecovery(SimpleNamespace(), services, capture, snapshots, settings)  # type: ignore[arg-type]
    beginning, reports = recovery.go_back(None, SimpleNamespace(size=2))  # type: ignore[arg-type]
    assert beginning is not None and beginning.state["from"] == "recorded" and reports is not None
    beginning, reports = recovery.go_back(None, SimpleNamespace(size=size))  # type: ignore[arg-type]
    assert beginning is not None and beginning.state["from"] == goes_on_from
    assert (reports is None) == (goes_on_from == "snapshot")
