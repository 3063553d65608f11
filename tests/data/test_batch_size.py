"""Samples in a batch of any kind."""

from __future__ import annotations

import logging
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Tiny
from torch.nn.utils.rnn import pack_sequence

import raytrainer as rt
from raytrainer.data.batch_size import batch_size_of, batch_sizes_in, first_batch_size

Point = namedtuple("Point", "x y")
SCALAR = torch.tensor(0.7)


@dataclass
class Sample:
    temperature: Any
    image: Any = None


class Encoding(UserDict):
    """As transformers' BatchEncoding: a mapping that moves itself."""

    def to(self, device: torch.device) -> Encoding:
        return Encoding({key: value.to(device) for key, value in self.items()})


class Graphs(SimpleNamespace):
    """As a batch of PyTorch Geometric: more nodes than graphs."""

    def __init__(self, graphs: int) -> None:
        super().__init__(x=torch.zeros(3 * graphs, 2), num_graphs=graphs)


class Sized:
    def __len__(self) -> int:
        return 6


class Keyed(Sized):
    """As a single graph: its length counts what it holds."""

    def keys(self) -> list[str]:
        return ["x"]


KNOWN = [
    (torch.zeros(5, 2), 5),
    ([torch.zeros(3), torch.zeros(9)], 3),
    ({"name": "x", "x": torch.zeros(4, 1)}, 4),
    ([{"deep": [torch.zeros(6)]}], 6),
    (Point(torch.zeros(2), None), 2),
    (Sample(torch.zeros(7, 3)), 7),
    (Encoding(a=torch.zeros(8)), 8),
    ([torch.zeros(1, 4), torch.zeros(9)], 1),
    # what has no dimension says nothing
    ({"temperature": SCALAR, "x": torch.zeros(4, 2)}, 4),
    ([SCALAR, torch.zeros(3)], 3),
    ([[SCALAR, [SCALAR]], {"a": SCALAR, "b": (torch.zeros(3),)}], 3),
    (Point(SCALAR, torch.zeros(2)), 2),
    (Sample(SCALAR, {"x": torch.zeros(2)}), 2),
    (Encoding(a=SCALAR, b=torch.zeros(8)), 8),
    (OrderedDict(a=SCALAR, b=torch.zeros(3)), 3),
    (defaultdict(list, a=SCALAR, b=torch.zeros(3)), 3),
    ((np.float32(1), np.zeros((5, 2))), 5),
    # objects that know it
    (Graphs(4), 4),
    ((SCALAR, Graphs(2)), 2),
    ({"graphs": Graphs(3), "y": torch.zeros(3)}, 3),
    (SimpleNamespace(batch_size=5, x=torch.zeros(50)), 5),
    (SimpleNamespace(batch_size=torch.Size([5, 2])), 5),
    (SimpleNamespace(node_stores=[SimpleNamespace(x=torch.zeros(9)), SimpleNamespace(batch_size=2)]), 2),
    (pack_sequence([torch.zeros(3), torch.zeros(2), torch.zeros(1)]), 3),
    (torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged), 2),
    (Sized(), 6),
    # columns, where there is nothing better
    (["a", "b", "c"], 3),
    ({"text": ["a", "b"], "id": [1, 2]}, 2),
    ({"tags": ["a", "b", "c"], "x": torch.zeros(4)}, 4),
    ([Keyed(), Keyed()], 2),
    (torch.zeros(0, 3), 0),
]
UNKNOWN = [SCALAR, [SCALAR], {"a": SCALAR, "b": 3}, [], {}, None, "text", 3, object(), Keyed(), Sample(SCALAR), Sample]


@pytest.mark.parametrize(("batch", "size"), KNOWN)
def test_known(batch: Any, size: int) -> None:
    assert batch_size_of(batch) == first_batch_size(batch) == size


@pytest.mark.parametrize("batch", UNKNOWN)
def test_unknown(batch: Any) -> None:
    assert batch_size_of(batch) is None
    assert first_batch_size(batch) == 1


def test_all_that_is_said() -> None:
    assert list(batch_sizes_in([SCALAR, {"a": torch.zeros(3), "b": [Graphs(4)]}, "abc"])) == [3, 4]


def test_tensordict() -> None:
    tensordict = pytest.importorskip("tensordict")
    inner = tensordict.TensorDict({"a": torch.zeros(4, 9)}, batch_size=[4])
    assert batch_size_of(inner) == batch_size_of((SCALAR, inner)) == 4
    assert batch_size_of(tensordict.TensorDict({"s": SCALAR, "a": torch.zeros(5)})) == 5


def test_graphs() -> None:
    data = pytest.importorskip("torch_geometric.data")
    graphs = [data.Data(x=torch.zeros(n, 2), edge_index=torch.zeros(2, 1, dtype=torch.long)) for n in (2, 3, 4)]
    assert batch_size_of(data.Batch.from_data_list(graphs)) == 3
    assert batch_size_of(graphs) == 3
    assert batch_size_of(graphs[0]) is None
    graphs[0].batch_size = 2  # seeds of a sampled neighbourhood
    assert batch_size_of(graphs[0]) == 2
    several = data.HeteroData()
    several["paper"].x, several["author"].x = torch.zeros(3, 2), torch.zeros(5, 2)
    assert batch_size_of(data.Batch.from_data_list([several, several])) == 2
    several["author"].batch_size = 4
    assert batch_size_of(several) == 4
    events = torch.arange(5)
    assert batch_size_of(data.TemporalData(src=events, dst=events, t=events, msg=torch.zeros(5, 2))) == 5


class Logs(Tiny):
    """Logs the batch's number."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("mean", float(batch_idx), on_step=False, on_epoch=True)
        self.log("sum", float(batch_idx), on_step=False, on_epoch=True, reduce_fx="sum")
        return self.layer(torch.ones(1, 4)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", float(batch_idx))


class Batches:
    """A loader of these batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def fitted(batches: list[Any]) -> dict[str, Any]:
    trainer = rt.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(Logs(), Batches(batches))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "batch_size=" in r.getMessage()]


@pytest.mark.parametrize(
    "make",
    [
        lambda n: {"temperature": SCALAR, "x": torch.zeros(n, 2), "y": torch.zeros(n)},
        lambda n: Graphs(n),
        lambda n: Sample(SCALAR, Point(SCALAR, torch.zeros(n, 2))),
        lambda n: ["name"] * n,
    ],
    ids=["scalar", "graphs", "dataclass", "names"],
)
def test_an_epochs_mean_is_over_samples(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    metrics = fitted([make(4), make(4), make(2)])
    assert metrics["mean"] == pytest.approx((0 * 4 + 1 * 4 + 2 * 2) / 10)
    assert metrics["sum"] == 3
    assert warned(caplog) == []


def test_a_size_that_cannot_be_known_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    assert fitted([object(), object(), object()])["mean"] == 1.0
    (message,) = warned(caplog)
    assert "training_step" in message and "object" in message and "self.log('mean', ..., batch_size=...)" in message


def test_a_size_that_is_ambiguous_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    fitted([[torch.zeros(3, 8, 8), torch.zeros(5)], [torch.zeros(3, 8, 8), torch.zeros(6)]])
    (message,) = warned(caplog)
    assert "3 here" in message and "others have 5" in message


def test_no_word_where_the_size_is_given_or_not_needed(caplog: pytest.LogCaptureFixture) -> None:
    class Given(Logs):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("mean", float(batch_idx), on_epoch=True, batch_size=3)
            self.log("most", float(batch_idx), on_epoch=True, reduce_fx="max")
            self.log("now", float(batch_idx))
            return self.layer(torch.ones(1, 4)).sum()

        def on_train_epoch_end(self) -> None:
            self.log("end", 1.0)

    rt.Trainer(max_epochs=1, logger=False, enable_checkpointing=False).fit(Given(), Batches([object(), object()]))
    assert warned(caplog) == []
