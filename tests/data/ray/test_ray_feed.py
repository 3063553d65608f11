"""Epochs of Ray Datasets that groups of several sizes share, as the feeds of their workers read them; without Ray."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytrainer.data.ray import blocks as ray_data
from raytrainer.data.ray.ray_feed import RayFeed
from raytrainer.data.ray.splitter import Reading, Splitter
from raytrainer.data.sharding import Share
from raytrainer.errors import DataError
from raytrainer.plan.settings import build_settings


class Blocks:
    """A dataset of blocks of uneven size, whose references are their rows."""

    def __init__(self, rows: int) -> None:
        generator, self.refs, at = random.Random(rows), list[range](), 0
        while at < rows:
            size = min(rows - at, generator.randint(1, 9))
            self.refs.append(range(at, at + size))
            at += size

    def iter_internal_ref_bundles(self) -> Any:
        entries = [SimpleNamespace(ref=r, metadata=SimpleNamespace(num_rows=len(r))) for r in self.refs]
        return iter([SimpleNamespace(blocks=entries)])


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_data, "_fetch", lambda ref, source: [({"id": torch.tensor(ref)}, len(ref))])


def source(**options: Any) -> Any:
    defaults = {"dataset": None, "columns": None, "dtypes": None, "collate_fn": None, "prefetch_batches": 0}
    return SimpleNamespace(**{**defaults, "shuffle": False, "drop_last": False, **options})


def blocks_of(keep: bool, dataset: Blocks, settings: Any, known: bool) -> Any:
    if keep:
        return ray_data.KeptBlocks(settings, list(dataset.refs), [len(r) for r in dataset.refs])
    streamed = object.__new__(ray_data.StreamedBlocks)
    splitter = Splitter(False, settings.batch_size, settings.drop_last)
    splitter.dataset = dataset
    total = sum(map(len, dataset.refs)) if known else None
    streamed.__dict__.update(source=settings, session=0, remote=False, total=total, _taken=None, splitter=splitter)
    return streamed


def read(blocks: Any, workers: int, before: Any, most: int, skip: int = 0) -> tuple[list[int], int]:
    """The rows that a group reads until its length, or `most` batches each, are done; and its batches."""
    settings = build_settings(strategy="ddp", num_processes=workers)
    feeds = [RayFeed(blocks, "train", Share(rank, workers), 5, settings) for rank in range(workers)]
    blocks.session = getattr(blocks, "session", 0) + 1
    rows: list[int] = []
    read = []
    for feed in feeds:
        feed.begin(0, before)
        length = most if feed.length is None else min(most, feed.length)
        batches = list(feed.start(2, skip))[:length]
        read.append(len(batches))
        rows += [row for batch in batches for row in batch["id"].tolist()]
    assert len(set(read)) == 1  # workers end together
    return rows, read[0]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, 8])
@pytest.mark.parametrize("way", ["kept", "streamed", "of unknown length"])
def test_groups_of_any_sizes_share_an_epoch(way: str, shuffle: bool | int, drop_last: bool) -> None:
    generator = random.Random(f"{way} {shuffle} {drop_last}")
    for _ in range(80):
        rows, size = generator.randint(15, 70), generator.randint(2, 5)
        dataset = Blocks(rows)
        settings = source(batch_size=size, shuffle=shuffle, drop_last=drop_last)
        seen: list[int] = []
        before: list[tuple[int, int]] = []
        for most in (generator.randint(0, 4), generator.randint(0, 3), 1000):
            workers = generator.randint(1, 3)
            there = blocks_of(way == "kept", dataset, settings, way != "of unknown length")
            found, batches = read(there, workers, before, most) if rows - len(seen) >= workers else ([], 0)
            seen += found
            before.append((workers, batches))
        assert len(seen) == len(set(seen)), (rows, size, before)
        missed = rows - len(seen)
        # each group may leave what gives no batch on every worker, which the next takes up; the last leaves it for good
        assert missed < (3 * size if drop_last else 3), (rows, size, before, missed)


def test_short_batches_that_are_done_do_not_count_as_full_ones() -> None:
    """Three workers have done 2 of 3 batches each, some of them of one row; two batches are left."""
    blocks = blocks_of(True, Blocks(13), source(batch_size=2), True)
    first, _ = read(blocks, 3, [], 2)
    rest, batches = read(blocks, 1, [(3, 2)], 1000)
    assert sorted(first + rest) == list(range(13))
    assert batches == -(-(13 - len(first)) // 2)


def test_a_splitter_that_is_kept_gives_nothing_of_this_run_to_workers_of_the_last() -> None:
    splitter = Splitter(True, 4, False)
    wanted = Reading(0, 5, False)

    def ask(session: int) -> Any:
        return splitter.next((session, 1), 0, 1, wanted)

    splitter.dataset = Blocks(30)
    assert ask(3)[0]
    splitter.close()
    splitter.begin(True, 4, False, 4)
    with pytest.raises(DataError, match="that is over"):
        ask(3)  # they had asked ahead, and are heard before the dataset is there
    splitter.dataset = Blocks(50)
    with pytest.raises(DataError, match="that is over"):
        ask(3)
    rows, ends = 0, None
    while ends is None:
        pieces, ends = ask(5)
        rows += sum(piece.rows for piece in pieces)
    assert rows == 50 and ends == (50, 50)
    splitter.close()
