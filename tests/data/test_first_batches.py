"""Workers that read the same are found out by their first batches."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from raytrainer.data.feed import Feed
from raytrainer.data.first_batches import BATCHES, DealtOut, Fingerprint, read_alike
from raytrainer.data.sharding import Share
from raytrainer.driver.reporting.same_data import SameData
from raytrainer.metric_messages import MetricReport
from raytrainer.plan.settings import build_settings


@dataclass
class Sample:
    x: Any
    y: Any = None


def samples(*streams: list[Any]) -> list[Any]:
    found = []
    for part, stream in enumerate(streams):
        print_ = Fingerprint("train", part, "advice")
        for batch in stream:
            print_.add(batch)
        found.append(print_.sample())
    return found


def noise(count: int, seed: int, size: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, 3, generator=generator) for _ in range(count)]


def counted(count: int, size: int = 4) -> list[torch.Tensor]:
    return [torch.arange(size * i, size * (i + 1)) for i in range(count)]


SAME = [
    (noise(3, 1), ""),
    (counted(2), ""),
    (counted(8, 1), ""),  # one sample a batch
    ([(batch, None) for batch in noise(3, 1)], "[0]"),
    ([{"x": batch, "name": "a"} for batch in noise(3, 1)], "['x']"),
    ([Sample("a", [batch]) for batch in noise(3, 1)], ".y[0]"),
    ([[f"file {i}", f"file {i + 1}"] for i in range(0, 12, 2)], ""),
    ([{"x": np.arange(i, i + 9.0)} for i in range(3)], "['x']"),
]


@pytest.mark.parametrize(("stream", "leaf"), SAME, ids=range(len(SAME)))
def test_the_same(stream: list[Any], leaf: str) -> None:
    assert read_alike(samples(stream, stream)) == (0, 1, leaf)
    other, one, same = samples(noise(len(stream), 5), stream, stream)
    assert read_alike([other, None, one, same]) == (2, 3, leaf)


def test_augmented_images_are_told_by_their_labels() -> None:
    labels = [torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    one, other = (list(zip(noise(3, seed), labels, strict=True)) for seed in (1, 2))
    assert read_alike(samples(one, other)) == (0, 1, "[1]")


DIFFERENT = [
    (noise(8, 1), noise(8, 2)),
    (counted(8), counted(16)[8:]),
    # what is the same says nothing
    ([torch.zeros(64)] * 8, [torch.zeros(64)] * 8),
    ([torch.arange(64)] * 8, [torch.arange(64)] * 8),
    ([{"x": b, "at": torch.arange(9)} for b in noise(8, 1)], [{"x": b, "at": torch.arange(9)} for b in noise(8, 2)]),
    (counted(2, 1), counted(2, 1)),
    (noise(1, 1), noise(1, 1)),
    ([object()] * 8, [object()] * 8),
    ([None] * 8, [None] * 8),
    (noise(8, 1), noise(7, 1)),  # at different places
    (list(range(4)), list(range(4))),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_different_or_unknown(one: list[Any], other: list[Any]) -> None:
    assert read_alike(samples(one, other)) is None


def test_workers_with_one_part_are_to_read_the_same() -> None:
    (sample,) = samples(noise(3, 1))
    assert read_alike([sample, sample, None]) is None


def test_graphs() -> None:
    data = pytest.importorskip("torch_geometric.data")
    graphs = [data.Data(x=x, edge_index=torch.zeros(2, 1, dtype=torch.long)) for x in noise(6, 1)]
    batches = [data.Batch.from_data_list(graphs[i : i + 2]) for i in range(0, 6, 2)]
    assert read_alike(samples(batches, batches)) == (0, 1, "['x']")


def test_tensordicts_are_read_by_name() -> None:
    tensordict = pytest.importorskip("tensordict")
    batches = [tensordict.TensorDict({"x": batch}, batch_size=[4]) for batch in noise(3, 1)]
    assert read_alike(samples(batches, batches)) == (0, 1, "['x']")


def test_said_once_with_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    same = SameData()
    one, other = samples(noise(3, 1), noise(3, 1))
    for _ in range(3):
        same.check([MetricReport(reads=(one,)), MetricReport(reads=(other,))])
        same.check([MetricReport(), MetricReport()])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "train loader" in record.getMessage() and "ranks 0 and 1" in record.getMessage()
    assert record.getMessage().endswith("advice.")


def test_what_is_watched() -> None:
    loader = torch.utils.data.DataLoader(torch.zeros(8))  # type: ignore[arg-type]
    settings = build_settings()
    dealt = Feed(loader, "train", Share(0, 2), 1, settings).watched
    assert isinstance(dealt, DealtOut) and dealt.complete
    assert Feed(loader, "train", Share(0, 1), 1, settings).watched is None
    assert Feed([1, 2], "train", Share(0, 1), 1, settings).watched is None  # one worker
    watched = Feed([1, 2], "val", Share(1, 2), 1, settings).watched
    assert isinstance(watched, Fingerprint) and (watched.loader, watched.part) == ("val", 1)
    for _ in range(BATCHES):
        assert not watched.complete
        watched.add(1)
    assert watched.complete


def by_rank(rank: int, kind: str) -> Any:
    numbers: Any = list(range(8))
    if kind == "subsets":
        return Subset(numbers, range(rank, 8, 2))
    if kind == "lengths":
        return numbers[: 7 + rank]
    if kind == "Hugging Face":
        datasets = pytest.importorskip("datasets")
        return datasets.Dataset.from_dict({"x": numbers}).shard(2, rank)
    return ConcatDataset([Subset(numbers, [1, 2]), Subset(numbers, torch.tensor([3, 4]))])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["subsets", "lengths", "Hugging Face", "the same"])
def test_parts_of_different_datasets(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """What each worker has split off by its rank is split once more."""
    same = SameData()
    for stage in ("train", "val"):
        marks = [DealtOut(stage, rank, by_rank(rank, kind)).sample() for rank in range(2)]
        for _ in range(2):
            same.check([MetricReport(reads=(mark,)) for mark in marks])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (0 if kind == "the same" else 2)
    assert all("Ranks 0 and 1 have different datasets" in text for text in told)
