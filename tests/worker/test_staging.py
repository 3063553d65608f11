"""Copies of a state: whole, and their own."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import torch

from raytrainer.worker.staging import Staging


def test_nothing_in_a_copy_is_changed_by_training() -> None:
    live: dict[str, Any] = {
        "weights": {"a": torch.ones(3)},
        "queue": deque([1]),
        "nested": [({"seen": {1}}, torch.zeros(2))],
        "epoch": 3,
    }
    copied = Staging().copy(live)
    live["weights"]["a"].zero_()
    live["queue"].append(2)
    live["nested"][0][0]["seen"].add(2)
    live["nested"][0][1].fill_(5.0)
    assert copied["weights"]["a"].tolist() == [1, 1, 1]
    assert copied["queue"] == deque([1])
    assert copied["nested"][0][0]["seen"] == {1} and copied["nested"][0][1].tolist() == [0, 0]
    assert copied["epoch"] == 3


def test_what_cannot_be_copied_stays() -> None:
    lock = threading.Lock()
    assert Staging().copy({"lock": lock})["lock"] is lock


def test_buffers_are_used_again_once_nobody_holds_the_copy() -> None:
    staging, live = Staging(), {"a": torch.ones(3)}
    first = staging.copy(live)
    place = first["a"].data_ptr()
    second = staging.copy(live)
    assert second["a"].data_ptr() != place
    del first
    live["a"].fill_(2.0)
    assert staging.copy(live)["a"].data_ptr() == place
    assert second["a"].tolist() == [1, 1, 1]
