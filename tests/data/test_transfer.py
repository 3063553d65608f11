"""Batches of any nesting reach the device whole, with their own types."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytrainer.data.transfer import cast_floating, map_leaves, move, to_cpu

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


class Attributes:
    """Moves itself, and is no container: what it holds is in its attributes."""

    def __init__(self, x: Any, name: str = "a") -> None:
        self.x, self.name = x, name

    def to(self, device: torch.device) -> Attributes:
        return Attributes(self.x.to(device), self.name)


class Slots:
    """The same without a `__dict__`."""

    __slots__ = ("name", "x")

    def __init__(self, x: Any) -> None:
        self.x, self.name = x, "a"

    def to(self, device: torch.device) -> Slots:
        return Slots(self.x.to(device))


class Applies(Attributes):
    """As PyTorch Geometric's data: changes itself."""

    def apply(self, change: Any) -> Applies:
        self.x = change(self.x)
        return self


@dataclass
class Scaled:
    """Would be scaled twice by `dataclasses.replace`."""

    x: torch.Tensor
    mask: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.x = self.x * 2
        self.mask = self.x > 0


class Moving(Scaled):
    """A dataclass that moves itself."""

    def to(self, device: torch.device) -> Moving:
        return self


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
    (Attributes(T), lambda b: [b.x]),
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
    assert moved.count == 7


def test_a_dataclass_is_not_initialised_again():
    scaled = Scaled(torch.ones(2))
    cast = cast_floating(scaled, torch.float64)
    assert cast.x.tolist() == [2.0, 2.0] and scaled.x.dtype == torch.float32
    assert move(scaled, META).mask.device.type == "meta"


def test_a_mapping_keeps_what_else_it_has():
    batch = defaultdict(list, a=T)
    moved = move(batch, META)
    assert moved["a"].device.type == "meta" and moved["new"] == [] and list(batch) == ["a"]


OBJECTS = [
    (Attributes(T), lambda b: b.x),
    (Slots(T), lambda b: b.x),
    (Attributes({"deep": [T]}), lambda b: b.x["deep"][0]),
    ([Applies(T)], lambda b: b[0].x),
    (Encoding(a=T), lambda b: b["a"]),
    (Encoding(a=[T]), lambda b: b["a"][0]),
    (Moving(T), lambda b: b.x),
    ({"p": torch.nn.utils.rnn.pack_sequence([T])}, lambda b: b["p"].data),
]


@pytest.mark.parametrize(("batch", "tensor"), OBJECTS, ids=lambda v: type(v).__name__ if not callable(v) else "")
def test_floating_tensors_in_objects_are_cast(batch, tensor):
    cast = cast_floating(batch, torch.float64)
    assert type(cast) is type(batch)
    assert tensor(cast).dtype == torch.float64 and tensor(batch).dtype == torch.float32
    assert tensor(to_cpu(batch)).data_ptr() != tensor(batch).data_ptr()


def test_what_belongs_to_packed_sequences_besides_their_data():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(1), torch.ones(2)], enforce_sorted=False)
    cast = cast_floating(packed, torch.float64)
    assert torch.equal(cast.sorted_indices, packed.sorted_indices)
    unpacked, lengths = torch.nn.utils.rnn.pad_packed_sequence(cast)
    assert unpacked.dtype == torch.float64 and lengths.tolist() == [1, 2]


def test_objects_that_do_not_move_stay_themselves():
    plain = SimpleNamespace(x=T)
    assert cast_floating([plain], torch.float64)[0] is plain and plain.x.dtype == torch.float32


def test_tensordict():
    tensordict = pytest.importorskip("tensordict")
    inner = {"i": torch.arange(2), "f": torch.ones(2)}
    batch = tensordict.TensorDict({"x": torch.ones(2, 3), "inner": inner}, batch_size=[2])
    cast = cast_floating((batch,), torch.bfloat16)[0]
    assert type(cast) is tensordict.TensorDict and cast.batch_size == (2,)
    assert (cast["x"].dtype, cast["inner", "f"].dtype, cast["inner", "i"].dtype) == (
        torch.bfloat16, torch.bfloat16, torch.long,
    )  # fmt: skip
    assert batch["x"].dtype == torch.float32
    assert move({"b": batch}, META)["b"]["inner", "f"].device.type == "meta"

    @tensordict.tensorclass
    class Record:
        x: torch.Tensor
        name: str

    record = cast_floating(Record(x=torch.ones(2), name="a", batch_size=[2]), torch.float64)
    assert record.x.dtype == torch.float64 and record.name == "a"


def test_graphs():
    data = pytest.importorskip("torch_geometric.data")
    graph = data.Data(x=torch.ones(3, 2), edge_index=torch.zeros(2, 1, dtype=torch.long), y=torch.ones(1))
    several = data.HeteroData()
    several["paper"].x = torch.ones(3, 2)
    for batch, x in [
        (graph, lambda b: b.x),
        (data.Batch.from_data_list([graph, graph]), lambda b: b.x),
        (data.Batch.from_data_list([several, several]), lambda b: b["paper"].x),
    ]:
        cast = cast_floating(batch, torch.float64)
        assert type(cast) is type(batch)
        assert x(cast).dtype == torch.float64 and x(batch).dtype == torch.float32
        assert "edge_index" not in cast or cast.edge_index.dtype == torch.long
        assert getattr(cast, "num_graphs", None) == getattr(batch, "num_graphs", None)
    assert move([graph.clone()], META)[0].x.device.type == "meta"


def test_cast_floating():
    batch = cast_floating(
        Point(torch.ones(1), {"i": torch.ones(1, dtype=torch.long), "b": torch.tensor([True])}), torch.float64
    )
    assert (batch.x.dtype, batch.y["i"].dtype, batch.y["b"].dtype) == (torch.float64, torch.long, torch.bool)


def test_map_leaves_sees_every_leaf_once():
    seen: list[Any] = []
    map_leaves({"a": [1, (2, Point(3, 4))], "b": 5}, lambda leaf: seen.append(leaf) or leaf)
    assert sorted(seen) == [1, 2, 3, 4, 5]
