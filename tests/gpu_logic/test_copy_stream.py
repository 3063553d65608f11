from __future__ import annotations

from collections import namedtuple
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from raytrainer.data import prefetch
from raytrainer.data.prefetch import CopyStream

META = torch.device("meta")  # a device that copies go to without any hardware


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.story.append(f"{self.name} waits for {other.name}")


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.done = cuda, False

    def record(self, stream: FakeStream) -> None:
        self.cuda.events.append(self)

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.cuda.story.append("CPU waits")
        self.done = True


class FakeCuda:
    """What CopyStream uses of torch.cuda."""

    def __init__(self) -> None:
        self.story: list[str] = []
        self.events: list[FakeEvent] = []
        self.compute = FakeStream(self, "compute")

    def Stream(self, device: Any) -> FakeStream:
        return FakeStream(self, "copy")

    def current_stream(self, device: Any) -> FakeStream:
        return self.compute

    def Event(self) -> FakeEvent:
        return FakeEvent(self)

    @contextmanager
    def stream(self, stream: FakeStream):
        self.story.append(f"on {stream.name}")
        yield


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()

    def record(tensor: torch.Tensor, stream: FakeStream) -> None:
        fake.story.append(f"{tuple(tensor.shape)} used by {stream.name}")

    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    return fake


def big(*shape: int) -> torch.Tensor:
    return torch.ones(*(shape or (prefetch.LEAST // 4,)))


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "batch",
    [
        big(),
        [big(), torch.ones(2)],
        {"a": {"b": [big()]}, "name": "text"},
        Pair(big(), torch.ones(1)),
        (big(), [1, "z"]),
    ],
)
def test_large_batches_of_any_nesting_take_the_side_stream(cuda, batch):
    moved = CopyStream(META, cuda)(batch, META, 0)
    assert type(moved) is type(batch)
    assert cuda.story[:2] == ["on copy", "compute waits for copy"]
    assert any(line.endswith("used by compute") for line in cuda.story[2:])


@pytest.mark.parametrize(
    ("pinned", "size", "aside"),
    [(3, 1, False), (3, prefetch.LEAST_PINNED // prefetch.LEAST, True), (2, 1, True), (0, 1, True)],
)
def test_pinned_memory_needs_larger_batches_to_take_it(cuda, monkeypatch, pinned, size, aside):
    tensors = [torch.ones(size, prefetch.LEAST // 4) for _ in range(3)]
    in_pinned = {tensor.data_ptr() for tensor in tensors[:pinned]}
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in in_pinned)
    CopyStream(META, cuda)({"x": tensors[0], "y": tensors[1:]}, META, 0)
    assert bool(cuda.story) is aside


class Opaque:
    """Has tensors that nobody can see."""

    def __init__(self) -> None:
        self.x = big()

    def to(self, device: Any) -> Opaque:
        self.x = self.x.to(device)
        return self


class Encoding(dict):
    """A mapping that moves itself, as transformers' does."""

    def to(self, device: Any) -> Encoding:
        return Encoding({key: value.to(device) for key, value in self.items()})


@pytest.mark.parametrize(
    "batch",
    [torch.ones(3), Opaque(), [big(), Opaque()], big().to(META), [big().to(META), big()], big(300, 300).to_sparse()],
)
def test_others_are_moved_as_always(cuda, batch):
    CopyStream(META, cuda)(batch, META, 0)
    assert cuda.story == []


def test_mappings_that_move_themselves(cuda):
    moved = CopyStream(META, cuda)(Encoding(x=big(4, prefetch.LEAST)), META, 0)
    assert isinstance(moved, Encoding) and moved["x"].device == META
    assert cuda.story[-1] == f"(4, {prefetch.LEAST}) used by compute"


def test_the_cpu_waits_when_the_gpu_is_far_behind(cuda, monkeypatch):
    monkeypatch.setattr(prefetch, "IN_FLIGHT", 3 * prefetch.LEAST)
    copy = CopyStream(META, cuda)
    for _ in range(4):
        copy(big(), META, 0)
    assert "CPU waits" not in cuda.story and len(cuda.events) == 3
    copy(big(), META, 0)  # the fourth event makes it more than three batches
    assert cuda.story.count("CPU waits") == 1
    for event in cuda.events:
        event.done = True
    copy(big(), META, 0)
    assert cuda.story.count("CPU waits") == 1 and copy._bytes <= prefetch.LEAST
