"""Loaders with an `__iter__` of their own: those that keep a reader, and those that wrap a loader."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from raytrainer.data.feed import Feed
from raytrainer.data.sharding import Share
from raytrainer.errors import DataError
from raytrainer.plan.settings import build_settings

SAMPLES = 16
MADE: list[Any] = []  # readers of the users', which end with their loaders


@pytest.fixture(autouse=True)
def end_users_readers():
    yield
    while MADE:
        shutdown = getattr(MADE.pop(), "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


class RepeatSampler:
    """timm's and Ultralytics'."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self):
        while True:
            yield from iter(self.sampler)


class MultiEpochsDataLoader(DataLoader[Any]):
    """timm's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._DataLoader__initialized = False
        if self.batch_sampler is None:
            self.sampler = RepeatSampler(self.sampler)
        else:
            self.batch_sampler = RepeatSampler(self.batch_sampler)
        self._DataLoader__initialized = True
        self.iterator = super().__iter__()
        MADE.append(self.iterator)

    def __len__(self) -> int:
        return len(self.sampler) if self.batch_sampler is None else len(self.batch_sampler.sampler)

    def __iter__(self):
        for _ in range(len(self)):
            yield next(self.iterator)


class Endless:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self):
        while True:
            yield from self.inner


class Keep(DataLoader[Any]):
    """Its `__iter__` changes the batches, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", Endless(self.batch_sampler))
        self.reader = super().__iter__()
        MADE.append(self.reader)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self):
        for _ in range(len(self)):
            yield next(self.reader) + 100


class KeepLater(DataLoader[Any]):
    """Makes its reader when it is first iterated."""

    reader: Any = None

    def __iter__(self):
        if self.reader is None:
            self.reader = super().__iter__()
        for _ in range(len(self)):
            yield next(self.reader)


class Around(DataLoader[Any]):
    def __iter__(self):
        for batch in super().__iter__():
            yield batch + 1


class Repeats(DataLoader[Any]):
    """Makes two batches of one."""

    def __len__(self) -> int:
        return 2 * super().__len__()

    def __iter__(self):
        for batch in super().__iter__():
            yield batch[:1]
            yield batch[1:]


class Halves(DataLoader[Any]):
    """Joins two batches."""

    def __len__(self) -> int:
        return super().__len__() // 2

    def __iter__(self):
        batches = super().__iter__()
        for batch in batches:
            yield torch.cat([batch, next(batches)])


class Prefetcher:
    """Reads one batch ahead of a loader."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self):
        batches = iter(self.loader)
        ahead = next(batches, None)
        while ahead is not None:
            batch, ahead = ahead, next(batches, None)
            yield batch

    def __len__(self) -> int:
        return len(self.loader)


class Shuffles(DataLoader[Any]):
    """Gives batches in an order of its own, as far as they are in its buffer."""

    buffer = SAMPLES

    def __iter__(self):
        held: list[Any] = []
        for batch in super().__iter__():
            held.append(batch)
            if len(held) > self.buffer:
                yield held.pop(random.randrange(len(held)))
        random.shuffle(held)
        yield from held


class ShufflesSome(Shuffles):
    buffer = 2


class Leaves(DataLoader[Any]):
    """Leaves batches out, whatever its length says."""

    def __iter__(self):
        return (batch for number, batch in enumerate(super().__iter__()) if number not in (1, 4))


class LeavesFirst(DataLoader[Any]):
    """A batch that is not trained on comes first; the others are changed, in place or not."""

    in_place = False

    def __iter__(self):
        batches = super().__iter__()
        next(batches)
        for batch in batches:
            yield batch.add_(SAMPLES) if self.in_place else batch + SAMPLES


class LeavesFirstInPlace(LeavesFirst):
    in_place = True


class LeavesLater(DataLoader[Any]):
    """Leaves a batch out by its place, where a run has gone on before that."""

    def __iter__(self):
        return (batch for number, batch in enumerate(super().__iter__()) if number != 3)


class ScalesAhead(DataLoader[Any]):
    """Reads one batch ahead, and changes inputs, but not labels."""

    def __iter__(self):
        batches = super().__iter__()
        ahead = next(batches, None)
        while ahead is not None:
            batch, ahead = ahead, next(batches, None)
            yield [batch / 255, batch]


class Several:
    """Reads one loader after the other."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts

    def __iter__(self):
        for part in self.parts.values() if isinstance(self.parts, dict) else self.parts:
            yield from part


class Silent(Prefetcher):
    """Does not know its length."""

    __len__ = None  # type: ignore[assignment]


class Joins(Prefetcher):
    """Makes one batch of two."""

    def __iter__(self):
        batches = iter(self.loader)
        for batch in batches:
            yield torch.cat([batch, next(batches)])

    def __len__(self) -> int:
        return len(self.loader) // 2


def make(kind: type, processes: int = 0) -> Any:
    if issubclass(kind, DataLoader):
        return kind(range(SAMPLES), batch_size=2, shuffle=True, num_workers=processes)
    return kind(make(DataLoader, processes))


def nested() -> Any:
    return Prefetcher(Prefetcher(make(MultiEpochsDataLoader)))


LOADERS: dict[str, Any] = {
    "MultiEpochsDataLoader": lambda: make(MultiEpochsDataLoader),
    "MultiEpochsDataLoader, process": lambda: make(MultiEpochsDataLoader, 1),
    "keeps, and changes batches": lambda: make(Keep),
    "keeps, and changes batches, process": lambda: make(Keep, 1),
    "keeps when iterated": lambda: make(KeepLater),
    "keeps when iterated, process": lambda: make(KeepLater, 1),
    "around": lambda: make(Around),
    "prefetcher": lambda: make(Prefetcher),
    "prefetcher, process": lambda: make(Prefetcher, 1),
    "prefetchers": nested,
}


def feeds(loader: Any, world: int, **options: Any) -> list[Feed]:
    return [Feed(loader(), "train", Share(rank, world), 3, build_settings(**options)) for rank in range(world)]


def read(source: Feed, epoch: int, skip: int = 0) -> list[Any]:
    source.begin(epoch)
    source.draw()
    found: list[Any] = []
    for index, batch in enumerate(source.start(epoch, skip), skip):
        if index == source.length:
            break
        found.append((batch % 100).tolist() if isinstance(batch, torch.Tensor) else batch)
    return found


@pytest.mark.sample(8)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_each_sample_once_and_resumed_exactly(kind, world):
    parts = feeds(LOADERS[kind], world)
    epochs = [[read(part, epoch) for part in parts] for epoch in range(3)]
    for part in parts:
        part.close()
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        samples = [i for part in epoch for batch in part for i in (batch if isinstance(batch, list) else [batch])]
        assert sorted(i - ("around" in kind) for i in samples) == list(range(SAMPLES))
        assert len({len(part) for part in epoch}) == 1
    for skip in (1, 3):
        again = feeds(LOADERS[kind], world)
        assert [read(part, 1, skip) for part in again] == [part[skip:] for part in epochs[1]]
        assert [read(part, 2) for part in again] == epochs[2]
        for part in again:
            part.close()


@pytest.mark.parametrize("kind", [Silent, Joins])
def test_wrappers_that_are_not_in_step_with_their_loader(kind):
    """Alone they are read again; on several workers it is an error that says what to do."""

    def loader() -> Any:
        return make(kind)

    (alone,) = feeds(loader, 1)
    whole = [read(alone, epoch) for epoch in range(2)]
    assert whole[0] != whole[1]
    assert sorted(i for batch in whole[1] for i in batch) == list(range(SAMPLES))
    (again,) = feeds(loader, 1)
    assert read(again, 1, 2) == whole[1][2:]
    with pytest.raises(DataError, match=rf"{kind.__name__} reads a DataLoader \(its \.loader\).*2 workers.*__len__"):
        feeds(loader, 2)
    assert [len(read(part, 0)) for part in feeds(loader, 2, use_distributed_sampler=False)] == [len(whole[0])] * 2


@pytest.mark.sample(4)
@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", [Repeats, Halves])
def test_loaders_that_make_other_batches(kind, world, processes):
    """All of an epoch is read, as long as their length says, and where a resumed run goes on is where they are."""
    parts = feeds(lambda: make(kind, processes), world)
    epochs = [[read(part, epoch) for part in parts] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(i for part in epoch for batch in part for i in batch) == list(range(SAMPLES))
    for skip in (1, 2, 3):
        again = feeds(lambda: make(kind, processes), world)
        assert [read(part, 1, skip) for part in again] == [part[skip:] for part in epochs[1]]
        for part in again:
            part.close()
    for part in parts:
        part.close()


@pytest.mark.sample(5)
@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", [Shuffles, ShufflesSome, Leaves])
def test_loaders_that_change_the_order_of_batches(kind, world, processes):
    """A resumed run gives the rest of what it gave, rather than the rest of what was asked for."""
    parts = feeds(lambda: make(kind, processes), world)
    whole, states = [read(part, 1) for part in parts], [part.state() for part in parts]
    given = sorted(i for part in whole for batch in part for i in batch)
    assert len(given) == len(set(given)) == SAMPLES - 4 * (kind is Leaves)
    for skip in (1, 2, 3):
        again = feeds(lambda: make(kind, processes), world)
        for part, state in zip(again, states, strict=True):
            part.take_state(state)
        assert [read(part, 1, skip) for part in again] == [part[skip:] for part in whole]
        for part in again:
            part.close()
    for part in parts:
        part.close()


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("kind", [LeavesFirst, LeavesFirstInPlace, Shuffles])
def test_the_order_is_known_with_the_first_batch(kind, processes):
    """What is told of a loader that has given a single batch is enough to go on from there."""
    (whole,) = feeds(lambda: make(kind, processes), 1)
    wanted = read(whole, 1)
    (part,) = feeds(lambda: make(kind, processes), 1)
    part.begin(1)
    part.draw()
    next(part.start(1))
    (again,) = feeds(lambda: make(kind, processes), 1)
    again.take_state(part.state())
    assert read(again, 1, 1) == wanted[1:]
    for one in (whole, part, again):
        one.close()


def test_reading_ahead_leaves_nothing_out():
    """A run goes on without reading again what was read before."""
    (part,) = feeds(lambda: make(ScalesAhead), 1)
    part.begin(1)
    part.draw()
    wanted = [labels.tolist() for _, labels in part.start(1)]
    assert not (part.state() or {}).get("apart")
    (again,) = feeds(lambda: make(ScalesAhead), 1)
    again.take_state(part.state())
    again.begin(1)
    again.draw()
    assert [labels.tolist() for _, labels in again.start(1, 3)] == wanted[3:]
    assert again.batches is not None and again.batches.skip == 3


def test_what_is_left_out_later_is_told(caplog):
    (part,) = feeds(lambda: make(LeavesLater), 1)
    part.begin(1)
    part.draw()
    batches = part.start(1)
    next(batches)
    state = part.state()
    assert len(list(batches)) == SAMPLES // 2 - 2
    assert "LeavesLater" not in caplog.text
    (again,) = feeds(lambda: make(LeavesLater), 1)
    again.take_state(state)
    read(again, 1, 1)
    assert "LeavesLater gives other batches than it reads" in caplog.text
    assert "went on at batch 1" in caplog.text


@pytest.mark.parametrize("form", [list, dict])
def test_an_iterable_that_holds_several_loaders(form):
    """How it reads them is not known: each worker would read all."""

    def loader(**options: Any) -> Any:
        parts = [DataLoader(range(8), 2, **options) for _ in range(2)]
        return Several(dict(enumerate(parts)) if form is dict else parts)

    assert len(read(feeds(loader, 1)[0], 0)) == 8
    with pytest.raises(DataError, match=r"Several holds 2 DataLoader\(s\).*2 workers.*CombinedLoader.*Distrib"):
        feeds(loader, 2)
    assert len(read(feeds(loader, 2, use_distributed_sampler=False)[0], 0)) == 8
    shared = feeds(lambda: loader(sampler=DistributedSampler(range(8), 2, 0)), 2)
    assert len(read(shared[0], 0)) == 4


def test_predictions_of_other_batches_have_no_order():
    loader = make(Repeats)
    Feed(loader, "predict", Share(0, 1), 3, build_settings())
    Feed(loader, "val", Share(0, 2), 3, build_settings())
    with pytest.raises(DataError, match=r"predict loader Repeats.*2 workers could not be put in order"):
        Feed(loader, "predict", Share(0, 2), 3, build_settings())


@pytest.mark.parametrize("form", [list, tuple, numpy.array, int])
def test_loaders_that_look_at_indices(form):
    """They are what the user's sampler gave, also where they bring a seed along."""

    class Looks(DataLoader[Any]):
        def __iter__(self):
            given = self.sampler if self.batch_sampler is None else self.batch_sampler
            return iter([(type(indices), indices) for indices in given])

    class Formed(Sampler[Any]):
        def __len__(self) -> int:
            return 4

        def __iter__(self):
            return iter([form([i, i + 1]) if form is not int else i for i in range(4)])

    options = {"sampler": Formed(), "batch_size": None} if form is int else {"batch_sampler": Formed()}
    (source,) = feeds(lambda: Looks(range(SAMPLES), num_workers=1, **options), 1)
    source.begin(0)
    source.draw()
    for kind, indices in source.start(0):
        assert issubclass(kind, numpy.ndarray if form is numpy.array else form)
        assert isinstance(indices, int) or indices[0] + 1 == indices[1]


class Noisy(Dataset[Any]):
    """Draws something for each sample."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index), torch.rand(()).item(), random.random(), numpy.random.rand()])


class Ahead(DataLoader[Any]):
    """Reads two batches ahead of what it gives."""

    def __iter__(self):
        batches = super().__iter__()
        held = [next(batches), next(batches)]
        for batch in batches:
            held.append(batch)
            yield held.pop(0)
        yield from held


LOOKS_AHEAD: dict[str, Callable[[], Any]] = {
    "own loader": lambda: Ahead(Noisy(), 2, shuffle=True),
    "prefetcher": lambda: Prefetcher(DataLoader(Noisy(), 2, shuffle=True)),
    "kept reader": lambda: MultiEpochsDataLoader(Noisy(), 2, shuffle=True),
}


@pytest.mark.parametrize("kind", LOOKS_AHEAD)
def test_what_is_drawn_for_batches_that_are_read_ahead(kind):
    """Each batch's noise is its own, wherever reading began; and the training's generators are left alone."""

    def noise(source: Feed, skip: int) -> list[Any]:
        source.begin(0)
        source.draw()
        before = torch.get_rng_state()
        found = [batch.tolist() for batch in source.start(0, skip)]
        assert torch.equal(before, torch.get_rng_state())
        return found

    whole = noise(*feeds(LOOKS_AHEAD[kind], 1), 0)
    assert len(whole) == SAMPLES // 2
    for skip in (1, 3):
        torch.manual_seed(skip)
        assert noise(*feeds(LOOKS_AHEAD[kind], 1), skip) == whole[skip:]


def test_a_thread_that_reads_leaves_the_generators_of_training_alone():
    """It runs beside the training, which draws meanwhile."""
    asked, read_on, held = threading.Event(), threading.Event(), []

    class InThread(Prefetcher):
        def __iter__(self):
            batches = iter(self.loader)

            def read() -> None:
                asked.wait(60)
                held.append(next(batches))
                read_on.set()

            threading.Thread(target=read).start()
            yield next(batches)
            yield held[0]

    (source,) = feeds(lambda: InThread(make(DataLoader)), 1)
    source.begin(0)
    source.draw()
    batches = source.start(0)
    next(batches)
    before = torch.get_rng_state()
    asked.set()
    assert read_on.wait(60)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(next(batches), held[0])


def test_a_reader_over_what_cannot_be_told(caplog):
    class Odd(MultiEpochsDataLoader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.batch_sampler.other = Sampler()

    def loader() -> Any:
        return make(Odd)

    with pytest.raises(DataError, match=r"Odd keeps a reader.*\.iterator.*2 workers.*persistent_workers=True"):
        feeds(loader, 2)
    with caplog.at_level(logging.WARNING, "raytrainer"):
        (alone,) = feeds(loader, 1)
    assert "persistent_workers=True" in caplog.text
    assert sorted(i for batch in read(alone, 0) for i in batch) == list(range(SAMPLES))


def test_the_users_loader_stays_as_it_is():
    for kind in LOADERS.values():
        loader = kind()
        before = dict(vars(loader))
        for rank in range(2):
            part = Feed(loader, "train", Share(rank, 2), 3, build_settings())
            read(part, 0)
            part.close()
        assert dict(vars(loader)) == before
