"""Cutting batches of any nesting, and joining outputs."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raytrainer.data.slicing import cut_batch, join_parts, rows_of, span_of
from raytrainer.errors import DataError

Point = namedtuple("Point", ["x", "y"])


@dataclass
class Sample:
    x: Any
    note: str = "all"


def test_spans_cover_everything_and_differ_by_one():
    for size in range(12):
        for count in range(1, 6):
            spans = [span_of(size, index, count) for index in range(count)]
            assert [i for begin, end in spans for i in range(begin, end)] == list(range(size))
            lengths = [end - begin for begin, end in spans]
            assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1


def test_cutting_and_joining_any_nesting():
    x = torch.arange(10.0).reshape(5, 2)
    batch = {
        "x": x,
        "pair": (x + 1, [x[:, 0]]),
        "point": Point(x, x * 2),
        "ordered": OrderedDict(a=x),
        "sample": Sample(x),
        "names": list("abcde"),
        "array": x.numpy(),
    }
    parts = [cut_batch(batch, *span_of(5, index, 3), 5) for index in range(3)]
    assert [len(part["x"]) for part in parts] == [2, 2, 1]
    assert parts[2]["names"] == ["e"]
    assert isinstance(parts[0]["point"], Point) and isinstance(parts[0]["ordered"], OrderedDict)
    assert parts[0]["sample"].note == "all"
    whole = join_parts([{**part, "sample": part["sample"].x} for part in parts])
    assert torch.equal(whole["x"], x) and torch.equal(whole["pair"][1][0], x[:, 0])
    assert torch.equal(whole["point"].y, x * 2) and whole["names"] == list("abcde")
    assert (whole["array"] == batch["array"]).all()


def test_arrays_and_mappings_of_any_kind():
    x = np.arange(5.0)
    whole = {
        "masked": np.ma.masked_array(x, mask=x == 3),
        "structured": np.array([(i, f"{i}") for i in range(5)], dtype=[("number", "i4"), ("name", "U2")]),
        "objects": np.array([{"a": i} for i in range(5)], dtype=object),
        "names": np.array(list("abcde")),
        "times": np.arange("2026-01-01", "2026-01-06", dtype="datetime64[D]"),
        "half": x.astype(np.float16),
        "unsigned": x.astype(np.uint32),
        "default": defaultdict(list, x=x),
        "counter": Counter(x=3),
    }
    parts = [cut_batch(whole, *span_of(5, index, 2), 5) for index in range(2)]
    counts = [part.pop("counter") for part in parts]
    joined = join_parts(parts)
    for name in whole.keys() - {"default", "counter"}:
        assert type(joined[name]) is type(whole[name]) and joined[name].dtype == whole[name].dtype, name
        assert joined[name].tolist() == whole[name].tolist()
    assert joined["masked"].mask.tolist() == [False, False, False, True, False]
    assert joined["default"].default_factory is list and joined["default"]["x"].tolist() == x.tolist()
    assert counts == [Counter(x=3)] * 2 and type(counts[0]) is Counter


def test_what_is_passed_whole():
    x = torch.zeros(4, 2)
    batch = [x, torch.tensor(3.0), "text", 7, None, ["a", "b"], {"k": 1}]
    cut = cut_batch(batch, 1, 2, rows_of(batch))
    assert cut[0].shape == (1, 2)
    assert cut[1:] == batch[1:]


def test_empty_slice():
    assert cut_batch({"x": torch.ones(1, 3), "n": ["a"]}, 1, 1, 1)["x"].shape == (0, 3)


@pytest.mark.parametrize(
    "batch, message",
    [
        ([torch.zeros(4), torch.zeros(3, 2)], r"batch of 4 samples holds a tensor of shape \(3, 2\)"),
        ([torch.zeros(4), torch.nn.utils.rnn.pack_sequence([torch.zeros(2)])], "PackedSequence, which cannot be split"),
        ([torch.zeros(4), SimpleNamespace(to=print)], "SimpleNamespace, which cannot be split"),
    ],
)
def test_what_cannot_be_split_is_refused(batch, message):
    with pytest.raises(DataError, match=message):
        cut_batch(batch, 0, 2, rows_of(batch))


def test_no_batch_dimension():
    assert rows_of({"names": ["a", "b"]}) == 2
    with pytest.raises(DataError, match="no tensor with a batch dimension"):
        rows_of({"x": torch.tensor(1.0), "n": None})


def test_joining():
    assert join_parts([torch.tensor(1.0), torch.tensor(2.0)]).tolist() == [1.0, 2.0]
    assert join_parts([1.5, 2.5]).tolist() == [1.5, 2.5]
    assert join_parts([None, None]) is None
    assert join_parts(["a", "b"]) == ["a", "b"]
    assert join_parts([[], ["a"]]) == ["a"]
    with pytest.raises(DataError, match="different types: NoneType, Tensor"):
        join_parts([torch.zeros(1), None])
    with pytest.raises(DataError, match="different structure"):
        join_parts([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}])


class Moves:
    """An object with a tensor inside, that moves itself; not known here."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device: object) -> Moves:
        return Moves(self.x.to(device))


def test_outputs_with_tensors_out_of_reach_are_refused() -> None:
    with pytest.raises(DataError, match=r"a step returned a Moves.*Return tensors, or a dict"):
        join_parts([{"out": Moves(torch.ones(1))}, {"out": Moves(torch.ones(2))}])


def test_outputs_that_torch_concatenates_stay_what_they_are() -> None:
    tensordict = pytest.importorskip("tensordict")
    parts = [tensordict.TensorDict({"x": torch.full((rows, 2), float(rows))}, [rows]) for rows in (1, 2)]
    joined = join_parts(parts)
    assert type(joined) is tensordict.TensorDict and joined.batch_size == (3,)
    assert joined["x"][:, 0].tolist() == [1.0, 2.0, 2.0]


def test_graphs_are_cut_and_joined_one_by_one() -> None:
    data = pytest.importorskip("torch_geometric.data")
    graphs = [
        data.Data(x=torch.full((nodes, 2), float(nodes)), edge_index=torch.tensor([[0], [nodes - 1]]), y=torch.ones(1))
        for nodes in (2, 3, 4)
    ]
    batch = data.Batch.from_data_list(graphs)
    for whole in (batch, {"graphs": batch, "labels": torch.arange(3)}):
        assert rows_of(whole) == 3
    parts = [cut_batch(batch, begin, end, 3) for begin, end in ((0, 2), (2, 3))]
    assert [part.num_graphs for part in parts] == [2, 1]
    assert parts[0].x[:, 0].tolist() == [2, 2, 3, 3, 3] and parts[1].edge_index.tolist() == [[0], [3]]
    assert type(parts[0]) is type(batch) is type(join_parts(parts))
    assert torch.equal(join_parts(parts).x, batch.x) and torch.equal(join_parts(parts).edge_index, batch.edge_index)
    assert cut_batch(batch, 3, 3, 3).num_graphs == 1  # for a worker that takes no step on it
    with pytest.raises(DataError, match="4 samples holds 3 graphs"):
        cut_batch((torch.ones(4), batch), 0, 2, 4)


@pytest.mark.parametrize("parts", [["a", "b"], [None, None], [{"s": "a", "n": None}, {"s": "b", "n": None}]])
def test_outputs_without_tensors_come_through(parts: list[object]) -> None:
    expected = None if parts[0] is None else parts if parts[0] == "a" else {"s": ["a", "b"], "n": None}
    assert join_parts(parts) == expected
