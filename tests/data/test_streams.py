"""Streams that know where they are: a resumed run reads what an undisturbed one reads, and reads nothing again."""

from __future__ import annotations

import copy
import functools
import logging
import random
import tempfile
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, get_worker_info

import raytrainer as rt
from raytrainer.data.feed import Feed
from raytrainer.data.look_ahead import LookAhead
from raytrainer.data.sharding import Share
from raytrainer.data.streams import stream_of
from raytrainer.plan.settings import build_settings
from raytrainer.seeding import capture_rng, restore_rng

SAMPLES = 26


class Numbers(IterableDataset[Any]):
    """A stream with a state, and noisy samples. `read` counts those read in this process."""

    read = 0

    def __init__(self) -> None:
        self.start = self.at = 0
        self.rng = random.Random(1)

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        begin, self.start = self.start or worker, 0
        for number in range(begin, SAMPLES, workers):
            self.at = number + workers
            Numbers.read += 1
            yield torch.tensor([float(number), torch.rand(()).item(), self.rng.random()])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "rng": self.rng.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["at"]
        version, words, gauss = state["rng"]
        self.rng.setstate((version, tuple(words), gauss))


class Arrays(Numbers):
    """Its state holds what NumPy and torch hold, and changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.draws, self.place = numpy.random.RandomState(3), torch.zeros(1, dtype=torch.long)

    def __iter__(self):
        for sample in super().__iter__():
            self.place.fill_(self.at)
            yield torch.cat([sample, torch.tensor([self.draws.rand()])])

    def state_dict(self) -> dict[str, Any]:
        state = {"numpy": self.draws.get_state(), "place": self.place, "rest": [self.at]}
        return {**super().state_dict(), **state, "at": numpy.int64(self.at)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "at": int(state["at"])})
        self.draws.set_state(state["numpy"])
        assert int(state["place"]) == state["at"] == state["rest"][0]


class Stateless(IterableDataset[Any]):
    """A stream that cannot be asked for its place; it shuffles, and counts epochs."""

    epochs = 0

    def __init__(self) -> None:
        self.rng = random.Random(1)

    def __iter__(self):
        self.epochs += 1
        order = list(range(SAMPLES))
        self.rng.shuffle(order)
        info = get_worker_info()
        for number in order if info is None else order[info.id :: info.num_workers]:
            yield torch.tensor([number + 100.0 * self.epochs, torch.rand(()).item(), random.random()])


class Drawing(IterableDataset[Any]):
    """A stream that shuffles files, and within a buffer, by the global generators."""

    def __iter__(self):
        order = list(range(SAMPLES))
        random.shuffle(order)
        if numpy.random.rand() < 0.5:
            order.reverse()
        buffer: list[int] = []
        for number in order:
            buffer.append(number)
            if len(buffer) > 4:
                yield torch.tensor([buffer.pop(int(torch.randint(len(buffer), ())))])
        yield from (torch.tensor([number]) for number in buffer)


class DrawingLoader:
    """An iterable of batches that draws all of an epoch's at once."""

    def __iter__(self):
        return iter(list(Drawing()))


class OwnLoader:
    """A user's loader with a state, and no torch in it."""

    def __init__(self, known: bool) -> None:
        self.start = self.at = 0
        if known:
            self.__class__ = OfKnownLength

    def __iter__(self):
        begin, self.start = self.start, 0
        for number in range(begin, SAMPLES):
            self.at = number + 1
            yield torch.tensor([number, random.random()])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["at"]


class OfKnownLength(OwnLoader):
    def __len__(self) -> int:
        return SAMPLES


class Shuffles:
    """An iterable of batches that shuffles with a generator of its own, or by counting its epochs."""

    def __init__(self, counts: bool) -> None:
        self.rng, self.epoch, self.counts = torch.Generator().manual_seed(5), 0, counts

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self):
        self.epoch += 1
        rng = torch.Generator().manual_seed(self.epoch) if self.counts else self.rng
        return iter([torch.tensor([i]) for i in torch.randperm(SAMPLES, generator=rng).tolist()])


class Deals(IterableDataset[Any]):
    """Draws an order with the global generators, and takes one worker's part of it."""

    def __init__(self, rank: int, world: int, at_once: bool = False) -> None:
        self.rank, self.world, self.at_once = rank, world, at_once

    def __iter__(self):
        samples = self.samples()
        return iter(list(samples)) if self.at_once else samples

    def samples(self):
        order = torch.randperm(SAMPLES).tolist()
        random.shuffle(order)
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for number in order[self.rank * workers + worker :: self.world * workers]:
            yield torch.tensor([float(number), torch.rand(()).item()])


class DealsBatches(Deals):
    """The same as a loader."""

    def __iter__(self):
        return (sample[None] for sample in super().__iter__())


def torchdatas(processes: int, dataset: Callable[[], Any] = Numbers) -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    return module.StatefulDataLoader(dataset(), batch_size=2, num_workers=processes)


def nodes() -> Any:
    nodes = pytest.importorskip("torchdata.nodes")
    batches = nodes.Batcher(nodes.IterableWrapper(range(SAMPLES)), 2)
    return nodes.Loader(nodes.Mapper(batches, torch.tensor))


def sampled_nodes() -> Any:
    """A node that counts epochs itself."""
    nodes = pytest.importorskip("torchdata.nodes")
    sampler = DistributedSampler(range(SAMPLES), 1, 0, shuffle=True)  # type: ignore[arg-type]
    return nodes.Loader(nodes.Mapper(nodes.Batcher(nodes.SamplerWrapper(sampler), 2), torch.tensor))


def web(rng: bool, processes: int) -> Any:
    """A pipeline of WebDataset's, of numbers rather than files."""
    webdataset = pytest.importorskip("webdataset")
    shuffle = webdataset.shuffle(4, rng=random.Random(1)) if rng else webdataset.detshuffle(4)
    pipeline = webdataset.DataPipeline(functools.partial(iter, range(SAMPLES)), webdataset.split_by_worker, shuffle)
    return DataLoader(pipeline, 2, num_workers=processes, persistent_workers=processes > 0)


def hugging_face(processes: int) -> Any:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"x": list(range(SAMPLES))}).to_iterable_dataset(num_shards=4)
    return DataLoader(whole.map(lambda row: {"y": row["x"] + 1}), batch_size=2, num_workers=processes)


def shuffled_by_hugging_face() -> Any:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"x": list(range(SAMPLES))}).to_iterable_dataset(num_shards=2)
    return DataLoader(whole.shuffle(seed=3, buffer_size=8), batch_size=2)


@functools.cache
def litdatas_folder() -> str:
    from litdata.streaming.writer import BinaryWriter

    folder = tempfile.mkdtemp()
    writer = BinaryWriter(folder, chunk_size=5)
    for number in range(SAMPLES):
        writer[number] = {"x": torch.tensor([number])}
    writer.done()
    writer.merge()
    return folder


def litdatas(processes: int) -> Any:
    litdata = pytest.importorskip("litdata")
    dataset = litdata.StreamingDataset(litdatas_folder(), shuffle=True)
    return litdata.StreamingDataLoader(dataset, batch_size=2, num_workers=processes)


#: kind of stream: how it is made
STREAMS: dict[str, Callable[[], Any]] = {
    "dataset": lambda: DataLoader(Numbers(), 2),
    "dataset, unbatched": lambda: DataLoader(Numbers(), None),
    "dataset, arrays": lambda: DataLoader(Arrays(), 2),
    "dataset, arrays, process": lambda: DataLoader(Arrays(), 2, num_workers=1),
    "dataset, process": lambda: DataLoader(Numbers(), 2, num_workers=1),
    "dataset, 3 processes": lambda: DataLoader(Numbers(), 2, num_workers=3, persistent_workers=True),
    "own loader": lambda: OwnLoader(False),
    "own loader of known length": lambda: OwnLoader(True),
    "torchdata": lambda: torchdatas(0),
    "torchdata, 2 processes": lambda: torchdatas(2),
    "torchdata.nodes": nodes,
    "torchdata.nodes, sampled": sampled_nodes,
    "WebDataset, generator": lambda: web(True, 0),
    "WebDataset, generator, 2 processes": lambda: web(True, 2),
    "WebDataset, detshuffle": lambda: web(False, 0),
    "WebDataset, detshuffle, 2 processes": lambda: web(False, 2),
    "Hugging Face": lambda: hugging_face(0),
    "Hugging Face, 2 processes": lambda: hugging_face(2),
    "Hugging Face, shuffled": shuffled_by_hugging_face,
    "litdata": lambda: litdatas(0),
    "litdata, 2 processes": lambda: litdatas(2),
    "stateless": lambda: DataLoader(Stateless(), 2),
    "stateless, 2 processes": lambda: DataLoader(Stateless(), 2, num_workers=2),
    "global generators": lambda: DataLoader(Drawing(), 2),
    "global generators, persisting": lambda: DataLoader(Drawing(), None, num_workers=1, persistent_workers=True),
    "global generators, own loader": lambda: DrawingLoader(),
    "iterable": lambda: Shuffles(False),
    "iterable that counts": lambda: Shuffles(True),
}


def feed(loader: Any) -> Feed:
    return Feed(loader, "train", Share(0, 1), 3, build_settings())


class Reader:
    """Reads as the training loop does: state and generators are taken between chunks."""

    def __init__(self, source: Feed) -> None:
        self.source = source
        self.marks: dict[int, tuple[Any, Any]] = {}

    def read(self, epoch: int, skip: int = 0, keep: bool = True) -> list[Any]:
        source, found = self.source, []
        source.begin(epoch)
        source.draw()
        kept = capture_rng() if skip else None
        batches = source.start(epoch, skip)
        if kept is not None:
            restore_rng(kept)
        while True:
            if isinstance(batches, LookAhead):
                batches.keeping = keep
            batch = next(batches, None)
            if batch is None:
                return found
            found.append(plain(batch))
            torch.rand(1)  # training draws too
            self.marks[skip + len(found)] = copy.deepcopy(source.state()), capture_rng()


def plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return {name: plain(value) for name, value in batch.items()} if isinstance(batch, dict) else batch


@pytest.fixture
def generators():
    before = capture_rng()
    torch.manual_seed(0)
    random.seed(0)
    yield
    restore_rng(before)


@pytest.mark.sample(9)
@pytest.mark.parametrize("kind", STREAMS)
def test_a_resumed_run_reads_the_very_samples(kind, generators):
    make = STREAMS[kind]
    undisturbed = Reader(feed(make()))
    first = undisturbed.read(0)
    before_second = undisturbed.source.state(), capture_rng()
    whole = undisturbed.read(1)
    after = undisturbed.read(2)
    assert len(whole) == len(first) > 5
    assert first != whole or kind == "torchdata.nodes" or "Hugging Face" in kind
    undisturbed = Reader(feed(make()))
    restore_rng(before_second[1])
    undisturbed.source.take_state(before_second[0])
    assert undisturbed.read(1) == whole  # from an epoch's beginning
    for skip in (1, 2, 3, 5, len(whole) - 1):
        state, rng = undisturbed.marks[skip]
        again = Reader(feed(make()))
        again.source.take_state(state)
        restore_rng(rng)
        assert again.read(1, skip) == whole[skip:], skip
        assert again.read(2) == after, skip
    undisturbed.source.close()


DEALS: dict[str, Callable[[int], Any]] = {
    "dataset": lambda rank: DataLoader(Deals(rank, 2), 2),
    "dataset, at once": lambda rank: DataLoader(Deals(rank, 2, True), 2),
    "dataset, 2 processes": lambda rank: DataLoader(Deals(rank, 2), 2, num_workers=2),
    "dataset, at once, 2 processes": lambda rank: DataLoader(Deals(rank, 2, True), 2, num_workers=2),
    "dataset, at once, persisting": lambda rank: DataLoader(
        Deals(rank, 2, True), 2, num_workers=2, persistent_workers=True
    ),
    "own loader": lambda rank: DealsBatches(rank, 2),
    "torchdata": lambda rank: torchdatas(0, functools.partial(Deals, rank, 2)),
    "torchdata, 2 processes": lambda rank: torchdatas(2, functools.partial(Deals, rank, 2)),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("stage", ["train", "val"])
@pytest.mark.parametrize("kind", DEALS)
def test_streams_that_shuffle_and_then_take_their_part(kind, stage, generators):
    """All workers draw the same order; noise after the first batch is each one's own; a resumed run reads the rest."""
    parts = [Feed(DEALS[kind](rank), stage, Share(rank, 2), 3, build_settings()) for rank in range(2)]
    readers = [Reader(part) for part in parts]
    read = [reader.read(epoch) for epoch in range(2) for reader in readers]
    first, second = read[:2], read[2:]
    assert sorted(row[0] for part in first for batch in part for row in batch) == list(range(SAMPLES))
    assert sorted(row[0] for part in second for batch in part for row in batch) == list(range(SAMPLES))
    assert first != second
    last = [part[-1][-1][1] for part in second]
    assert len(set(last)) == 2 or "at once" in kind
    if stage == "train":
        state, rng = readers[0].marks[3]
        again = Reader(feed(DEALS[kind](0)))
        again.source.take_state(state)
        restore_rng(rng)
        assert again.read(1, 3) == second[0][3:]
    for part in parts:
        part.close()


@pytest.mark.parametrize("kind", [k for k in STREAMS if k in ("dataset", "own loader", "torchdata")])
def test_nothing_is_read_again(kind):
    make = STREAMS[kind]
    reader = Reader(feed(make()))
    reader.read(0)
    batches = len(reader.marks)
    again = feed(make())
    again.take_state(reader.marks[batches - 1][0])
    Numbers.read = 0
    again.begin(0)
    assert len(list(again.start(0, batches - 1))) == 1
    assert Numbers.read <= 2


class Fits(rt.Module):
    """Weights that tell in which order, and with which noise, batches came."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        values = next(iter(batch.values())) if isinstance(batch, dict) else batch
        return (self.weight - values.float().mean() - torch.rand(1)).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


@pytest.mark.sample(5)
@pytest.mark.parametrize("kind", STREAMS)
def test_weights_of_a_resumed_run(kind, local_trainer, tmp_path):
    """From checkpoints in the middle, and at the end, of the second epoch."""
    make = STREAMS[kind]
    whole = Fits()
    every = rt.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = local_trainer(max_epochs=3, seed=3, callbacks=[every], accumulate_grad_batches=2)
    trainer.fit(whole, make())
    steps = trainer.global_step // 3
    for step in (steps + 1, 2 * steps - 1, 2 * steps):
        resumed = Fits()
        trainer = local_trainer(max_epochs=3, seed=3, accumulate_grad_batches=2)
        trainer.fit(resumed, make(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert trainer.global_step == 3 * steps
        assert torch.equal(whole.weight, resumed.weight), step


def test_a_run_that_failed_reads_on(local_trainer, tmp_path):
    """Its state is from before the chunk that failed; the few batches since are read again."""

    class Sees(Fits):
        def __init__(self, fails: bool = False) -> None:
            super().__init__()
            self.seen: list[tuple[int, list[int]]] = []
            self.fails = fails

        def training_step(self, batch, batch_idx):
            if self.fails and batch_idx == 7 and self.current_epoch == 1:
                raise ArithmeticError
            self.seen.append((self.current_epoch, batch[:, 0].int().tolist()))
            return super().training_step(batch, batch_idx)

    whole, failed, resumed = Sees(), Sees(True), Sees()
    local_trainer(max_epochs=3).fit(whole, DataLoader(Numbers(), 2))
    with pytest.raises(ArithmeticError):
        local_trainer(max_epochs=3, callbacks=[rt.OnExceptionCheckpoint(tmp_path)]).fit(
            failed, DataLoader(Numbers(), 2)
        )
    (path,) = tmp_path.glob("*.ckpt")
    local_trainer(max_epochs=3).fit(resumed, DataLoader(Numbers(), 2), ckpt_path=path)
    assert failed.seen + resumed.seen == whole.seen


def test_an_epoch_that_was_cut_short_is_followed_by_the_next(local_trainer, tmp_path):
    every = rt.ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    whole, resumed = Fits(), Fits()
    local_trainer(max_epochs=3, seed=3, limit_train_batches=5, callbacks=[every]).fit(whole, sampled_nodes())
    trainer = local_trainer(max_epochs=3, seed=3, limit_train_batches=5)
    trainer.fit(resumed, sampled_nodes(), ckpt_path=tmp_path / "step=5.ckpt")
    assert torch.equal(whole.weight, resumed.weight)


def test_a_shuffle_by_the_clock_is_told(caplog):
    webdataset = pytest.importorskip("webdataset")
    for shuffle, told in (
        (webdataset.shuffle(4), 1),
        (webdataset.shuffle(4, seed=1), 0),
        (webdataset.detshuffle(4), 0),
    ):
        caplog.clear()
        pipeline = webdataset.DataPipeline(functools.partial(iter, range(SAMPLES)), shuffle)
        with caplog.at_level(logging.WARNING, "raytrainer"):
            feed(DataLoader(pipeline, 2))
        assert caplog.text.count("rng=random.Random(1)") == told


@pytest.mark.parametrize(("persist", "told"), [(True, 1), (False, 0)])
def test_what_is_counted_in_processes_that_persist(persist, told, caplog):
    """It cannot be put back, which a resumed run says."""

    class Counting(IterableDataset[Any]):
        epochs = 0

        def __init__(self) -> None:
            self.size = 4

        def __iter__(self):
            self.epochs += 1
            return iter([self.epochs] * self.size)

    reader = Reader(feed(DataLoader(Counting(), 2, num_workers=1, persistent_workers=persist)))
    reader.read(0)
    reader.read(1)
    again = feed(DataLoader(Counting(), 2, num_workers=1, persistent_workers=persist))
    with caplog.at_level(logging.WARNING, "raytrainer"):
        again.take_state(reader.marks[1][0])
        again.begin(1)
    reader.source.close()
    assert caplog.text.count("set_epoch(epoch)") == told


def test_other_processes_begin_the_epoch_anew(caplog):
    reader = Reader(feed(DataLoader(Numbers(), 2, num_workers=1)))
    reader.read(0)
    again = Reader(feed(DataLoader(Numbers(), 2)))
    with caplog.at_level(logging.WARNING, "raytrainer"):
        again.source.take_state(reader.marks[4][0])
    assert "begins anew" in caplog.text and "1 loader process" in caplog.text
    assert [int(row[0]) for batch in again.read(0, 4) for row in batch] == list(range(SAMPLES))


@pytest.mark.parametrize(
    "make", [lambda: DataLoader(Numbers(), 2), lambda: [torch.ones(1)] * 6], ids=["stream", "list"]
)
def test_another_number_of_workers_begins_the_epoch_anew(make, caplog):
    source = feed(make())
    with caplog.at_level(logging.WARNING, "raytrainer"):
        source.begin(0, ((3, 2),))
    assert "the epoch begins anew" in caplog.text
    source.draw()
    assert len(list(source.start(0))) == len(list(make()))


def test_a_state_that_cannot_be_stored_is_read_up_to_again(caplog):
    class Odd(Numbers):
        def state_dict(self):
            return {"at": self.at, "what": object()}

    reader = Reader(feed(DataLoader(Odd(), 2)))
    with caplog.at_level(logging.WARNING, "raytrainer"):
        whole = reader.read(0)
    assert caplog.text.count("read this epoch again") == 1
    again = Reader(feed(DataLoader(Odd(), 2)))
    again.source.take_state(reader.marks[3][0])
    assert [row[0] for batch in again.read(0, 3) for row in batch] == [row[0] for b in whole[3:] for row in b]


def test_a_release_whose_state_loses_samples_is_read_again(monkeypatch):
    datasets = pytest.importorskip("datasets")
    assert stream_of(hugging_face(0)) is not None
    monkeypatch.setattr(datasets, "__version__", "4.6.0")
    assert stream_of(hugging_face(0)) is None
