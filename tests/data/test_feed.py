"""What a worker reads of a user's loader: which samples, in which order, from which batch on."""

from __future__ import annotations

import gc
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from raytrainer.data.combined_loader import as_list
from raytrainer.data.feed import Feed
from raytrainer.data.look_ahead import LookAhead
from raytrainer.data.sharding import Share
from raytrainer.errors import ConfigurationError, DataError
from raytrainer.plan.settings import build_settings

SEED = 11
WORLDS = (1, 2, 3, 5)


def feeds(loader: Any, stage: str = "train", world: int = 1, seed: int = SEED, **options: Any) -> list[Feed]:
    settings = build_settings(**options)
    return [Feed(loader, stage, Share(rank, world), seed, settings) for rank in range(world)]


def read(feed: Feed, epoch: int = 0, skip: int = 0) -> list[Any]:
    """The batches that a worker's loop would use, as lists."""
    batches = []
    for index, batch in enumerate(feed.start(epoch, skip), start=skip):
        if feed.length is not None and index >= feed.length:
            break
        batches.append(batch.tolist() if isinstance(batch, torch.Tensor) else batch)
    return batches


def flat(batches: list[Any]) -> list[Any]:
    return [item for batch in batches for item in batch]


def loader(samples: int = 20, **options: Any) -> DataLoader[Any]:
    return DataLoader(range(samples), **{"batch_size": 3, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"shuffle": True}])
@pytest.mark.parametrize("world", [1, 2])
def test_lengths_are_those_of_data_sizes_and_limits_as_they_are_by_now(world, options):
    rows = list(range(12))
    source = DataLoader(rows, batch_size=3, **options)  # type: ignore[arg-type]
    for feed in feeds(source, "val", world, limit_val_batches=0.5):
        assert feed.draw() == 2 // world
        rows += range(12)
        assert feed.draw() == 4 // world  # data may grow in a hook before the order is drawn
        feed.begin(1)
        assert feed.length == feed.draw() == 4 // world
        del rows[12:]
        feed.begin(2)
        assert feed.length == feed.draw() == 2 // world


# ---------------------------------------------------------------- order


def test_shuffling_is_kept_and_drawn_from_seed_and_epoch():
    feed = feeds(loader(shuffle=True))[0]
    epochs = [read(feed, epoch) for epoch in (0, 1, 2)]
    assert all(sorted(flat(epoch)) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # the same seed, the same order, whatever was read before and whatever the generators hold
    torch.manual_seed(999)
    again = feeds(loader(shuffle=True))[0]
    assert [read(again, epoch) for epoch in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]
    assert read(feeds(loader(shuffle=True), seed=SEED + 1)[0]) != epochs[0]


def test_without_shuffling_the_order_is_kept():
    feed = feeds(loader())[0]
    assert flat(read(feed, 0)) == flat(read(feed, 5)) == list(range(20))


def test_shuffling_leaves_the_global_generators_alone():
    for source in (loader(shuffle=True), loader(sampler=WeightedRandomSampler([1.0] * 20, 20))):
        before = torch.get_rng_state(), random.getstate()
        read(feeds(source, world=2)[0])
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_training_shards_samples_and_pads(world, shuffle):
    parts = [read(feed, 3) for feed in feeds(loader(shuffle=shuffle), world=world)]
    assert len({len(part) for part in parts}) == 1  # no worker waits for another one
    counts = Counter(item for part in parts for item in flat(part))
    assert set(counts) == set(range(20))
    assert sum(counts.values()) == -(-20 // world) * world  # as few taken twice as can be
    # one worker's share is what DistributedSampler would give
    order = flat(read(feeds(loader(shuffle=shuffle))[0], 3))
    padded = order + order[: -len(order) % world]
    assert [flat(part) for part in parts] == [padded[rank::world] for rank in range(world)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("samples", [1, 2, 6, 7, 20])
@pytest.mark.parametrize("stage", ["val", "test", "predict"])
def test_evaluation_counts_every_sample_once(world, samples, stage):
    parts = [read(feed) for feed in feeds(loader(samples), stage, world)]
    whole = read(feeds(loader(samples), stage)[0])
    assert sorted(batch for part in parts for batch in part) == sorted(whole)  # whole batches, each once
    assert [part for part in parts] == [whole[rank::world] for rank in range(world)]
    assert [feed.length for feed in feeds(loader(samples), stage, world)] == [len(part) for part in parts]


@pytest.mark.parametrize("world", WORLDS)
def test_shuffled_evaluation_counts_every_sample_once(world):
    parts = [read(feed, 2) for feed in feeds(loader(shuffle=True), "val", world)]
    assert sorted(item for part in parts for item in flat(part)) == list(range(20))


@pytest.mark.parametrize(("limit", "world", "lengths"), [(1.0, 3, [3, 2, 2]), (2, 3, [2, 2, 2]), (0.5, 3, [1, 1, 1])])
def test_evaluation_limits(limit, world, lengths):
    assert [feed.length for feed in feeds(loader(), "val", world, limit_val_batches=limit)] == lengths


def test_drop_last():
    assert [len(batch) for batch in read(feeds(loader(drop_last=True))[0])] == [3] * 6
    assert [[len(batch) for batch in read(feed)] for feed in feeds(loader(drop_last=True), world=3)] == [[3, 3]] * 3


# ---------------------------------------------------------------- samplers of the user's


class EvenFirst(Sampler[list[int]]):
    """A batch sampler: batches of even numbers, then of odd ones, each kind in random order."""

    def __init__(self, samples: int, size: int) -> None:
        self.samples, self.size = samples, size

    def __len__(self) -> int:
        return len(self.batches())

    def batches(self) -> list[list[int]]:
        numbers = [list(range(start, self.samples, 2)) for start in (0, 1)]
        return [kind[i : i + self.size] for kind in numbers for i in range(0, len(kind), self.size)]

    def __iter__(self):
        batches = self.batches()
        random.shuffle(batches)
        return iter(batches)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", ["train", "val"])
def test_custom_batch_sampler(world, stage):
    source = DataLoader(range(20), batch_sampler=EvenFirst(20, 4))  # type: ignore[arg-type]
    parts = [read(feed, 1) for feed in feeds(source, stage, world)]
    assert all(len({item % 2 for item in batch}) == 1 for part in parts for batch in part)  # batches stay whole
    assert {item for part in parts for item in flat(part)} == set(range(20))
    if stage == "train":
        assert len({len(part) for part in parts}) == 1
    else:
        assert sum(len(flat(part)) for part in parts) == 20


@pytest.mark.parametrize("world", [1, 2])
def test_custom_batch_sampler_is_drawn_from_seed_and_epoch(world):
    source = DataLoader(range(40), batch_sampler=EvenFirst(40, 4))  # type: ignore[arg-type]
    first = [read(feed, 1) for feed in feeds(source, world=world)]
    random.seed(123)
    assert [read(feed, 1) for feed in feeds(source, world=world)] == first
    assert [read(feed, 2) for feed in feeds(source, world=world)] != first


@pytest.mark.parametrize("world", [1, 2])
def test_weighted_sampler(world):
    weights = [0.0] * 10 + [1.0] * 10
    source = loader(sampler=WeightedRandomSampler(weights, 50))
    parts = [read(feed, 0) for feed in feeds(source, world=world)]
    drawn = [item for part in parts for item in flat(part)]
    assert len(drawn) == 50 and min(drawn) >= 10
    assert parts == [read(feed, 0) for feed in feeds(source, world=world)]
    assert parts != [read(feed, 1) for feed in feeds(source, world=world)]


def test_random_sampler_with_options_is_respected():
    with_replacement = loader(sampler=RandomSampler(range(20), replacement=True, num_samples=60))
    assert len(flat(read(feeds(with_replacement)[0]))) == 60
    some = loader(sampler=RandomSampler(range(20), num_samples=5))
    assert len(set(flat(read(feeds(some)[0])))) == 5


class Reversed(Sampler[int]):
    def __init__(self, samples: int) -> None:
        self.samples, self.epoch = samples, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def __iter__(self):
        return iter([(i + self.epoch) % self.samples for i in reversed(range(self.samples))])


def test_own_sampler_is_sharded_and_told_the_epoch():
    parts = [flat(read(feed, 4)) for feed in feeds(loader(sampler=Reversed(20)), world=2)]
    assert [pair for pairs in zip(*parts, strict=True) for pair in pairs] == [(i + 4) % 20 for i in reversed(range(20))]


def test_own_distributed_sampler_is_respected():
    sampler = DistributedSampler(range(20), num_replicas=2, rank=0, shuffle=True, seed=5)  # type: ignore[arg-type]
    feed = feeds(loader(sampler=sampler), world=2)[0]
    for epoch in (0, 3):
        got = flat(read(feed, epoch))
        sampler.set_epoch(epoch)
        assert got == list(sampler)


@pytest.mark.parametrize("own", [True, False])
def test_another_number_of_workers_goes_on(own):
    """Two workers have done 3 batches each; three take up the rest, also where they shard by a sampler of their own."""
    seen = []
    for world, before, batches in ((2, (), 3), (3, ((2, 3),), 100)):
        for rank in range(world):
            options = {"sampler": DistributedSampler(range(60), world, rank, shuffle=False)} if own else {}
            feed = Feed(loader(60, **options), "train", Share(rank, world), SEED, build_settings())
            feed.begin(0, before)
            seen += flat(read(feed)[:batches])
    assert sorted(seen) == list(range(60))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("form", ["batch_size", "batch_sampler"])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_another_batch_size_goes_on(size, form, world):
    """Two workers have done 3 batches of 3 each; others take up the rest in batches of their own."""
    seen = []
    for workers, samples, before, batches in ((2, 3, (), 3), (world, size, ((2, 3, 3),), 100)):
        for rank in range(workers):
            data: Any = range(60)
            if form == "batch_size":
                source = DataLoader(data, samples, shuffle=True)
            else:
                source = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), samples, drop_last=False))
            feed = Feed(source, "train", Share(rank, workers), SEED, build_settings())
            assert feed.batch_size == samples
            feed.begin(0, before)
            seen += flat(read(feed)[:batches])
    assert sorted(seen) == list(range(60))


def test_use_distributed_sampler_false():
    parts = [flat(read(feed)) for feed in feeds(loader(), world=2, use_distributed_sampler=False)]
    assert parts == [list(range(20))] * 2


def test_overfit_batches_does_not_shuffle():
    feed = feeds(loader(shuffle=True), overfit_batches=2)[0]
    assert read(feed, 0) == read(feed, 1) == [[0, 1, 2], [3, 4, 5]]


# ---------------------------------------------------------------- loaders that do not batch, and iterables


@pytest.mark.parametrize("world", [1, 2])
def test_no_automatic_batching(world):
    source = DataLoader(TensorDataset(torch.arange(6)), batch_size=None, shuffle=True)
    parts = [[batch[0].item() for batch in read(feed, 1)] for feed in feeds(source, world=world)]
    assert sorted(item for part in parts for item in part) == list(range(6))
    assert parts == [[batch[0].item() for batch in read(feed, 1)] for feed in feeds(source, world=world)]


class Stream(IterableDataset[int]):
    def __init__(self, samples: int) -> None:
        self.samples, self.epoch = samples, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(range(100 * self.epoch, 100 * self.epoch + self.samples))


def test_iterable_dataset():
    feed = feeds(DataLoader(Stream(7), batch_size=3))[0]
    assert feed.length is None
    assert read(feed) == [[0, 1, 2], [3, 4, 5], [6]]
    assert read(feed, 2) == [[200, 201, 202], [203, 204, 205], [206]]
    assert read(feed, 2, skip=1) == [[203, 204, 205], [206]]


@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (50, 3), (1.0, 3)])
def test_limits_of_an_unknown_length(limit, batches):
    assert len(read(feeds(DataLoader(Stream(7), batch_size=3), limit_train_batches=limit)[0])) == batches


def test_fraction_of_an_unknown_length():
    with pytest.raises(ConfigurationError, match=r"limit_train_batches=0\.5.*no length"):
        feeds(DataLoader(Stream(7)), limit_train_batches=0.5)


@pytest.mark.parametrize("ends", [(3, 3), (3, 1), (1, 4), (0, 2)])
def test_unequal_iterables_end_together(ends):
    """Each worker reads ahead by one; when one has no more, the others drop what they hold."""

    def lockstep(readers: int) -> list[list[int]]:
        # what the collective does: the n-th question of all workers has one answer
        streams = [iter(range(end)) for end in ends]
        ahead = [next(s, None) for s in streams]
        got: list[list[int]] = [[] for _ in ends]
        while all(item is not None for item in ahead):
            for mine, item in zip(got, ahead, strict=True):
                mine.append(item)
            ahead = [next(s, None) for s in streams]
        return got

    expected = lockstep(len(ends))
    for rank, end in enumerate(ends):
        answers = iter([all(question < other for other in ends) for question in range(max(ends) + 2)])
        ahead = LookAhead(iter(range(end)), lambda more, answers=answers: next(answers))
        got, last = [], []
        for item in ahead:
            got.append(item)
            last.append(ahead.is_last)
        assert got == expected[rank]
        assert last == [False] * (len(got) - 1) + [True] * bool(got)


def test_look_ahead_alone():
    ahead = LookAhead(iter("ab"), None)
    assert [(item, ahead.is_last) for item in ahead] == [("a", False), ("b", True)]
    assert list(LookAhead(iter(()), None)) == []


def test_any_iterable_of_batches():
    batches = [torch.tensor([1]), torch.tensor([2])]
    feed = feeds(batches)[0]
    assert (feed.length, read(feed), read(feed, 1)) == (2, [[1], [2]], [[1], [2]])
    assert read(feed, 1, skip=1) == [[2]]


# ---------------------------------------------------------------- going on in the middle of an epoch


class Noisy(Dataset[torch.Tensor]):
    """Random augmentation, with every generator."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        import numpy

        return torch.tensor([index, torch.rand(()).item(), random.random(), numpy.random.rand()])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_skipping_gives_exactly_the_rest(world, shuffle):
    for rank in range(world):
        whole = read(feeds(loader(shuffle=shuffle), world=world)[rank], 2)
        for skip in range(len(whole) + 1):
            assert read(feeds(loader(shuffle=shuffle), world=world)[rank], 2, skip) == whole[skip:]


def test_skipping_reads_no_sample_in_vain():
    seen = []

    class Seen(Dataset[int]):
        def __len__(self):
            return 9

        def __getitem__(self, index):
            seen.append(index)
            return index

    read(feeds(DataLoader(Seen(), batch_size=3))[0], 0, skip=2)
    assert seen == [6, 7, 8]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_sampler": EvenFirst(12, 2)},
        {"batch_size": 2, "sampler": WeightedRandomSampler([1.0] * 12, 12)},
        {"batch_size": 2, "sampler": Reversed(12)},
    ],
    ids=["batch sampler", "weighted", "own"],
)
@pytest.mark.parametrize("world", [1, 2])
def test_skipping_with_own_samplers(options, world):
    whole = read(feeds(DataLoader(range(12), **options), world=world)[0], 1)  # type: ignore[arg-type]
    random.seed(77)  # a resumed run finds the generators in the middle of the epoch
    torch.manual_seed(77)
    rest = read(feeds(DataLoader(range(12), **options), world=world)[0], 1, skip=2)  # type: ignore[arg-type]
    assert rest == whole[2:]


@pytest.mark.parametrize("persistent", [False, True])
def test_loader_processes_augment_alike_wherever_a_run_resumes(persistent):
    pytest.importorskip("numpy")

    def make(workers: int) -> Feed:
        options = {"persistent_workers": persistent} if workers else {}
        source = DataLoader(Noisy(), batch_size=2, shuffle=True, num_workers=workers, **options)
        return feeds(source)[0]

    feed = make(2)
    epochs = [read(feed, epoch) for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert read(make(2), 1) == epochs[1]
    assert read(make(2), 1, skip=3) == epochs[1][3:]
    assert read(make(1), 1, skip=3) == epochs[1][3:]  # the number of processes does not matter
    values = [value for batch in epochs[1] for row in batch for value in row[1:]]
    assert len(set(values)) == len(values)  # no two samples are augmented alike


def test_ranks_augment_differently():
    pytest.importorskip("numpy")
    source = DataLoader(Noisy(), batch_size=2, num_workers=1)
    parts = [read(feed) for feed in feeds(source, world=2)]
    assert parts[0][0][0][1] != parts[1][0][0][1]


# ---------------------------------------------------------------- errors, and the user's objects


@pytest.mark.parametrize(
    ("source", "world", "stage", "message"),
    [
        (loader(2, drop_last=True), 1, "train", r"2 sample\(s\), batch_size=3, drop_last=True.*smaller batch_size"),
        (loader(5, drop_last=True), 2, "train", None),
        (loader(3, drop_last=True), 2, "train", r"no batch for rank . of 2.*fewer workers"),
        (5, 1, "train", r"the train loader is 5: give a DataLoader"),
    ],
)
def test_too_little_to_read(source, world, stage, message):
    if message is None:
        assert len(feeds(source, stage, world)) == world
        return
    with pytest.raises(DataError, match=message):
        feeds(source, stage, world)


@pytest.mark.parametrize(
    ("source", "world", "stage"), [(loader(0), 1, "train"), (loader(0), 2, "val"), ([], 1, "train")]
)
def test_nothing_to_read(source, world, stage, caplog):
    found = feeds(source, stage, world)
    assert [feed.length for feed in found] == [0] * world and all(feed.nothing for feed in found)
    (message,) = [r.getMessage() for r in caplog.records]
    assert f"The {stage} loader has no batch for rank 0 of {world}" in message
    assert f"limit_{stage}_batches=0" in message


def test_nothing_to_read_is_fine_when_the_stage_is_off():
    assert feeds(loader(0), "val", limit_val_batches=0)[0].length == 0


def test_fewer_evaluation_batches_than_workers():
    found = feeds(loader(3), "val", 3)
    assert [feed.length for feed in found] == [1, 0, 0] and not any(feed.nothing for feed in found)


class Endless(Sampler[list[int]]):
    def __iter__(self):
        while True:
            yield [0]


def test_batch_sampler_without_length():
    source = DataLoader(range(3), batch_sampler=Endless())  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"batch sampler Endless has no length.*2 workers.*__len__"):
        feeds(source, world=2)
    assert read(feeds(source, limit_train_batches=3)[0]) == [[0]] * 3


@pytest.mark.parametrize(
    "source",
    [
        loader(shuffle=True),
        loader(num_workers=1),
        DataLoader(Stream(7), batch_size=3),
        DataLoader(range(8), batch_sampler=EvenFirst(8, 2)),  # type: ignore[arg-type]
        DataLoader(range(8), batch_size=None),  # type: ignore[arg-type]
    ],
    ids=["shuffled", "processes", "iterable", "batch sampler", "unbatched"],
)
@pytest.mark.parametrize("world", [1, 2])
def test_the_users_loader_is_left_unchanged(source, world):
    before = dict(vars(source))
    for feed in feeds(source, world=world):
        read(feed, 3)
    assert dict(vars(source)) == before


@pytest.mark.parametrize(
    ("given", "count"),
    [(None, 0), (loader(), 1), ([loader(), loader()], 2), ((loader(),), 1), ({"a": loader(), "b": loader()}, 2),
     ([torch.zeros(1), torch.zeros(1)], 1), (Stream(3), 1)],
)  # fmt: skip
def test_one_loader_or_several(given, count):
    assert len(as_list(given)) == count


def test_batch_sampler_subclass_keeps_its_own_rule():
    class Big(BatchSampler):
        def __iter__(self):
            for batch in super().__iter__():
                yield [*batch, 99]

    class Clip(Dataset[int]):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return index

    source = DataLoader(Clip(), batch_sampler=Big(SequentialSampler(range(6)), 3, False))
    assert read(feeds(source)[0]) == [[0, 1, 2, 99], [3, 4, 5, 99]]


class Heap(Dataset[tuple[bool, bool]]):
    """Samples say whether the process that makes them has a frozen heap, and collects its garbage."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[bool, bool]:
        return gc.get_freeze_count() > 0, gc.isenabled()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_loader_processes_get_no_garbage(frozen, enabled):
    """What they inherit is frozen there; here all is as before. (This suite's heap is frozen, a user's is not.)"""
    options = {"num_workers": 1, "multiprocessing_context": "fork"}
    source = DataLoader(Heap(), 1, collate_fn=lambda samples: samples[0], **options)
    if not frozen:
        gc.unfreeze()
    if not enabled:
        gc.disable()
    try:
        assert read(*feeds(source)) == [(True, enabled)]
        assert source.dataset[0] == (frozen, enabled)
    finally:
        gc.enable()
        gc.freeze()
