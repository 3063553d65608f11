"""Copies of a state: whole, and their own."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import pytest
import torch

from raytrainer.worker import staging as module
from raytrainer.worker.staging import Staging, arrived


def test_nothing_in_a_copy_is_changed_by_training() -> None:
    live: dict[str, Any] = {
        "weights": {"a": torch.ones(3)},
        "queue": deque([1]),
        "nested": [({"seen": {1}}, torch.zeros(2))],
        "epoch": 3,
    }
    copied = Staging(torch.device("cpu")).copy(live)
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
    assert Staging(torch.device("cpu")).copy({"lock": lock})["lock"] is lock


def test_buffers_are_used_again_once_nobody_holds_the_copy() -> None:
    staging, live = Staging(torch.device("cpu")), {"a": torch.ones(3)}
    first = staging.copy(live)
    place = first["a"].data_ptr()
    second = staging.copy(live)
    assert second["a"].data_ptr() != place
    del first
    live["a"].fill_(2.0)
    assert staging.copy(live)["a"].data_ptr() == place
    assert second["a"].tolist() == [1, 1, 1]


class Device:
    """A GPU whose tensors are those of 32 bits."""

    def __init__(self, room: bool = False) -> None:
        self.room = room  # for copies of its tensors
        self.on_the_way = 0
        self.allocations: list[tuple[str, int]] = []
        self.may_allocate = threading.Event()
        self.may_allocate.set()
        self.waits = 0

    def kind(self, tensor: torch.Tensor) -> Any:
        return tensor.dtype, tensor.shape, tensor.dtype is torch.float32

    def pinned(self, kinds: Any, device: Any) -> list[torch.Tensor]:
        assert self.may_allocate.wait(60)
        self.allocations.append((threading.current_thread().name, len(kinds)))
        return [torch.empty(shape, dtype=dtype) for dtype, shape in kinds]

    def way_home(self, device: torch.device) -> Device:
        return self

    def send(self, tensors: list[torch.Tensor], places: list[torch.Tensor]) -> Any:
        if not self.room:
            return None
        copies = [tensor.clone() for tensor in tensors]
        self.on_the_way += 1

        def arrive() -> None:
            for copy, place in zip(copies, places, strict=True):
                place.copy_(copy)
            self.on_the_way -= len(copies) > 0
            copies.clear()
            places.clear()

        return arrive

    def current_stream(self) -> Device:
        return self

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()
    monkeypatch.setattr(module, "_kind", fake.kind)
    monkeypatch.setattr(module, "pinned_tensors", fake.pinned)
    monkeypatch.setattr(module, "WayHome", fake.way_home)
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current_stream)
    return fake


LIVE = {"weights": {"a": torch.ones(3), "tied": torch.ones(3)}, "steps": [torch.zeros(1, dtype=torch.int64)]}


def test_memory_is_taken_beforehand_by_a_thread(device: Device) -> None:
    staging = Staging(torch.device("cpu"))
    device.may_allocate.clear()
    staging.reserve(LIVE)
    staging.reserve(LIVE)
    assert device.allocations == []  # and this thread has not waited
    device.may_allocate.set()
    copied = staging.copy(LIVE)
    assert device.allocations == [("raytrainer-reserve", 2)]
    assert copied["weights"]["tied"].tolist() == [1, 1, 1] and copied["steps"][0].tolist() == [0]
    assert copied["weights"]["a"].data_ptr() != copied["weights"]["tied"].data_ptr()
    del copied
    staging.reserve(LIVE)  # what is free does
    staging.copy(LIVE)
    assert len(device.allocations) == 1


def test_what_reserving_did_not_foresee_is_taken_by_the_copy(device: Device) -> None:
    staging = Staging(torch.device("cpu"))
    staging.reserve({"a": torch.ones(3)})
    copied = staging.copy({"other": torch.full((2, 2), 5.0), **LIVE})
    assert copied["other"].tolist() == [[5, 5], [5, 5]] and copied["weights"]["a"].tolist() == [1, 1, 1]
    assert [count for _, count in device.allocations] == [1, 2]


def test_where_reserving_fails_the_copy_tries_again(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(kinds: Any, device: Any) -> Any:
        raise RuntimeError("no memory")

    staging = Staging(torch.device("cpu"))
    monkeypatch.setattr(module, "pinned_tensors", fails)
    staging.reserve(LIVE)
    with pytest.raises(RuntimeError, match="no memory"):
        staging.copy(LIVE)
    monkeypatch.setattr(module, "pinned_tensors", device.pinned)
    assert staging.copy(LIVE)["weights"]["a"].tolist() == [1, 1, 1]


def test_buffers_that_a_copy_does_not_need_stay_for_the_next(device: Device) -> None:
    """Weights alone, then all, then weights alone."""
    staging = Staging(torch.device("cpu"))
    staging.copy(LIVE)
    held = staging.copy({"weights": {"a": torch.ones(3)}})
    assert len(staging.copy(LIVE)["steps"]) == 1
    assert [count for _, count in device.allocations] == [2, 1]  # one, since one is held
    del held
    for _ in range(4):
        copies = [staging.copy(LIVE) for _ in range(3)]
        del copies
    staging.copy(LIVE)
    assert max(map(len, staging._free.values())) <= 4  # what two copies take


def test_another_run_has_memory_reserved_for_its_own_state(device: Device) -> None:
    staging = Staging(torch.device("cpu"))
    staging.copy(LIVE)
    staging.begin()
    larger = {"a": torch.ones(3), "b": torch.ones(9), "c": torch.ones(9)}
    staging.reserve(larger)
    assert staging.copy(larger)["c"].tolist() == [1] * 9
    assert [count for _, count in device.allocations] == [2, 2]
    assert {tuple(shape) for _, shape, _ in staging._free} <= {(3,), (9,)}  # of the first run's, what fits the second
    staging.begin()
    staging.copy({"d": torch.ones(5)})
    assert [tuple(shape) for _, shape, _ in staging._free] == [(5,)] or not staging._free


def test_a_copy_that_fails_still_waits_for_what_it_has_begun(device: Device) -> None:
    staging = Staging(torch.device("cpu"))
    with pytest.raises(RuntimeError):
        staging.copy({"a": torch.ones(3), "sparse": torch.ones(3).to_sparse()})
    assert device.waits == 1


def test_training_does_not_wait_for_what_a_gpu_has_copied_aside(device: Device) -> None:
    device.room = True
    staging = Staging(torch.device("cpu"))
    live = {"weights": {"a": torch.ones(3)}, "own": {"sum": torch.ones(2)}}
    copied = staging.copy(live)
    assert copied["own"]["sum"].tolist() == [1, 1] and device.waits == 1  # this goes to the driver at once
    assert device.on_the_way == 1
    live["weights"]["a"].zero_()
    assert arrived(copied)["weights"]["a"].tolist() == [1, 1, 1]
    assert arrived(copied)["weights"]["a"].tolist() == [1, 1, 1]  # also for who asks later
    staging.copy({"weights": live["weights"]})
    assert device.waits == 1


def test_training_waits_for_a_gpu_that_has_no_room(device: Device) -> None:
    copied = Staging(torch.device("cpu")).copy(LIVE)
    assert device.waits == 1 and copied["weights"]["a"].tolist() == [1, 1, 1]
    assert arrived(copied) is copied


def test_buffers_are_used_again_only_when_what_was_on_the_way_is_there(device: Device) -> None:
    device.room = True
    staging = Staging(torch.device("cpu"))
    place = staging.copy(LIVE)["weights"]["a"].data_ptr()
    assert device.on_the_way == 0  # nobody has asked for it, or will
    device.room = False
    assert staging.copy(LIVE)["weights"]["a"].data_ptr() == place


def test_two_copies_of_one_moment_share_what_is_large() -> None:
    """As those of the best checkpoint and the last are; what small things differ in is each one's own."""
    staging, live = Staging(torch.device("cpu")), {"a": torch.ones(100_000), "step": torch.zeros(())}
    first = staging.copy(live)
    live["step"] += 1
    second = staging.copy(live)
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert (float(first["step"]), float(second["step"])) == (0, 1)
    del first
    place = second["a"].data_ptr()
    live["a"].data[5] = 3.0  # of which the tensor's version does not tell
    third = staging.copy(live)
    assert third["a"].data_ptr() != place and third["a"][5] == 3
    assert second["a"][5] == 1
    del second
    live["a"] += 1
    assert staging.copy(live)["a"].data_ptr() == place  # once nobody holds either of the two


def test_nothing_is_shared_where_a_large_tensor_has_changed() -> None:
    staging, live = Staging(torch.device("cpu")), {"a": torch.ones(100_000), "b": torch.ones(100_000)}
    first = staging.copy(live)
    live["b"] += 1
    second = staging.copy(live)
    assert second["a"].data_ptr() != first["a"].data_ptr()
