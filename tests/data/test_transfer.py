"""Batches of any nesting reach the device whole, with their own types."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from raytrainer.data.transfer import cast_floating, first_batch_size, map_leaves, move

META = torch.device("meta")  # a device that every machine has, and that is not the CPU
Point = namedtuple("Point", "x y")


@dataclass
class Sample:
    image: torch.Tensor
    label: Any = None
    extra: list[Any] = field(default_factory=list)
    count: int = field(init=False, default=3)


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor


class Movable:
    """As torch_geometric's Data and PackedSequence: it has `.to` and gives a moved copy."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def to(self, device: torch.device) -> Movable:
        return Movable(device)


class InPlace:
    """Moves itself, returning nothing."""

    device: torch.device | None = None

    def to(self, device: torch.device) -> None:
        self.device = device


class Encoding(UserDict):
    """As transformers' BatchEncoding: a mapping that moves itself."""

    def to(self, device: torch.device) -> Encoding:
        return Encoding({key: value.to(device) for key, value in self.items()})


T = torch.zeros(2)
NESTED: list[tuple[Any, Any]] = [
    (T, lambda b: [b]),
    ([T, [T]], lambda b: [b[0], b[1][0]]),
    ((T, (T,)), lambda b: [b[0], b[1][0]]),
    ({"a": T, "b": {"c": [T]}}, lambda b: [b["a"], b["b"]["c"][0]]),
    (OrderedDict(a=T), lambda b: [b["a"]]),
    (Point(T, [T]), lambda b: [b.x, b.y[0]]),
    (Sample(T, (T,), [Point(T, T)]), lambda b: [b.image, b.label[0], b.extra[0].y]),
    (Frozen(T), lambda b: [b.x]),
    ([Movable(), {"m": Movable()}], lambda b: [b[0], b[1]["m"]]),
    ((InPlace(),), lambda b: [b[0]]),
    (Encoding(a=T), lambda b: [b["a"]]),
    ([Encoding(a=T)], lambda b: [b[0]["a"]]),
    (torch.nn.utils.rnn.pack_sequence([T]), lambda b: [b.data]),
]


@pytest.mark.parametrize(("batch", "leaves"), NESTED, ids=lambda v: type(v).__name__ if not callable(v) else "")
def test_move(batch, leaves):
    moved = move(batch, META)
    assert type(moved) is type(batch)
    assert {leaf.device.type for leaf in leaves(moved)} <= {"meta"}


def test_what_is_no_tensor_stays_itself():
    thing = object()
    batch = {"id": 3, "name": "x", "none": None, "thing": thing, "set": {1, 2}, "class": Sample, "bytes": b"x"}
    moved = move(batch, META)
    assert moved == batch and moved["thing"] is thing


def test_the_original_is_left_alone():
    batch = {"a": [T], "p": Sample(T)}
    move(batch, META)
    assert batch["a"][0] is T and batch["p"].image.device.type == "cpu"


def test_moving_to_where_it_is_copies_nothing():
    assert move([T], torch.device("cpu"))[0] is T


def test_fields_that_init_does_not_take():
    sample = Sample(T)
    sample.count = 7
    moved = move(sample, META)
    assert moved.image.device.type == "meta"
    assert moved.count in (3, 7)  # not an error


def test_cast_floating():
    batch = cast_floating(
        Point(torch.ones(1), {"i": torch.ones(1, dtype=torch.long), "b": torch.tensor([True])}), torch.float64
    )
    assert (batch.x.dtype, batch.y["i"].dtype, batch.y["b"].dtype) == (torch.float64, torch.long, torch.bool)


def test_map_leaves_sees_every_leaf_once():
    seen: list[Any] = []
    map_leaves({"a": [1, (2, Point(3, 4))], "b": 5}, lambda leaf: seen.append(leaf) or leaf)
    assert sorted(seen) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        (torch.tensor(1.0), 1),
        ([torch.zeros(3), torch.zeros(9)], 3),
        ({"name": "x", "x": torch.zeros(4, 1)}, 4),
        ([{"deep": [torch.zeros(6)]}], 6),
        (Point(torch.zeros(2), None), 2),
        (Sample(torch.zeros(7, 3)), 7),
        (Encoding(a=torch.zeros(8)), 8),
        ([], 1),
        (None, 1),
        ("text", 1),
        (3, 1),
        ([torch.zeros(1, 4), torch.zeros(9)], 1),
    ],
)
def test_first_batch_size(batch, size):
    assert first_batch_size(batch) == size
