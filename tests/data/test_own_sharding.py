"""Samplers that read one part are left alone, or put in their place."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler

from raytrainer.data.feed import Feed
from raytrainer.data.own_sharding import own_part, remedy
from raytrainer.data.sharding import Share
from raytrainer.errors import ConfigurationError
from raytrainer.plan.settings import build_settings

DATA = torch.arange(12.0)


class Interleaved(Sampler[int]):
    """One part, as timm's and transformers' samplers: not derived from torch's DistributedSampler."""

    def __init__(self, num_replicas: int, rank: int) -> None:
        self.num_replicas, self.rank = num_replicas, rank

    def __len__(self) -> int:
        return 12 // self.num_replicas

    def __iter__(self) -> Any:
        return iter(range(self.rank, 12, self.num_replicas))


class Batches(Interleaved):
    """The same of batches."""

    def __len__(self) -> int:
        return 6 // self.num_replicas

    def __iter__(self) -> Any:
        return iter([[2 * i, 2 * i + 1] for i in range(self.rank, 6, self.num_replicas)])


def torchs(count: int, rank: int) -> DistributedSampler[Any]:
    return DistributedSampler(DATA, count, rank, shuffle=False)  # type: ignore[arg-type]


def loader(kind: str, count: int, rank: int) -> DataLoader[Any]:
    options: dict[str, Any] = {
        "torch": lambda: {"batch_size": 2, "sampler": torchs(count, rank)},
        "unbatched": lambda: {"batch_size": None, "sampler": torchs(count, rank)},
        "in batches": lambda: {"batch_sampler": BatchSampler(torchs(count, rank), 2, False)},
        "other": lambda: {"batch_size": 2, "sampler": Interleaved(count, rank)},
        "batches": lambda: {"batch_sampler": Batches(count, rank)},
    }[kind]()
    return DataLoader(DATA, **options)  # type: ignore[arg-type]


def read(loaders: list[DataLoader[Any]], stage: str = "train") -> list[list[float]]:
    count = len(loaders)
    feeds = [Feed(given, stage, Share(i, count), 1, build_settings()) for i, given in enumerate(loaders)]
    return [[x for batch in feed.start(0) for x in batch.flatten().tolist()] for feed in feeds]


@pytest.mark.parametrize("stage", ["train", "val"])
@pytest.mark.parametrize("kind", ["torch", "unbatched", "in batches", "other", "batches"])
def test_left_alone(kind: str, stage: str, caplog: pytest.LogCaptureFixture) -> None:
    parts = read([loader(kind, 3, rank) for rank in range(3)], stage)
    assert sorted(x for part in parts for x in part) == DATA.tolist()
    assert [len(part) for part in parts] == [4, 4, 4]
    assert caplog.records == []


@pytest.mark.parametrize("made", [(1, 0), (3, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("kind", ["torch", "unbatched", "in batches"])
def test_made_where_the_place_was_not_known(kind: str, made: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    """As on the driver: every worker gets the same sampler."""
    caplog.set_level(logging.INFO)
    given = loader(kind, *made)
    parts = read([given] * 3)
    assert [sorted(part) for part in parts] == [list(range(rank, 12, 3)) for rank in range(3)]
    assert own_part(given.batch_sampler or given.sampler) == made[::-1]  # the user's stays as it is
    assert sum("each of the 3 takes its own part" in r.getMessage() for r in caplog.records) == 1


def test_one_worker_reads_all_that_more_would_have_read() -> None:
    assert read([loader("torch", 2, 1)]) == [DATA.tolist()]


@pytest.mark.parametrize("kind", ["other", "batches"])
def test_others_say_what_to_do(kind: str) -> None:
    with pytest.raises(ConfigurationError, match=r"reads part 0 of 1, but this worker's part is 0 of 2.*rt\.rank\(\)"):
        read([loader(kind, 1, 0)] * 2)


def test_whether_a_sampler_has_a_part() -> None:
    assert own_part(BatchSampler(torchs(4, 3), 2, False)) == (3, 4)
    assert own_part(RandomSampler(DATA)) is None and own_part(None) is None  # type: ignore[arg-type]


def test_remedies() -> None:
    class Stream:
        pass

    for package, words in [
        ("datasets.x", "split_dataset_by_node"),
        ("litdata", "train_dataloader"),
        ("m", "data_part"),
    ]:
        Stream.__module__ = package
        assert words in remedy(Stream()) and words in remedy(DataLoader(Stream()))  # type: ignore[arg-type]
