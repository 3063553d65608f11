"""Samplers of all kinds: a resumed run reads what the undisturbed one reads, and lengths follow the epoch."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

import raytrainer as rt
from raytrainer.data.epoch_state import of_all_workers
from raytrainer.data.feed import Feed
from raytrainer.data.sharding import Share
from raytrainer.plan.settings import build_settings

SAMPLES = 16


class Drawn(Sampler[int]):
    """A user's sampler with a generator of its own."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rng: Any = {
            "torch": lambda: torch.Generator().manual_seed(7),
            "numpy": lambda: numpy.random.default_rng(7),
            "numpy legacy": lambda: numpy.random.RandomState(7),
            "python": lambda: random.Random(7),
            "spawns": lambda: numpy.random.SeedSequence(7),
            "spawns too": lambda: numpy.random.default_rng(7),
            "held": lambda: {"rngs": [(random.Random(7), None)]},
        }[kind]()

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self):
        if self.kind == "torch":
            return iter(torch.randperm(SAMPLES, generator=self.rng).tolist())
        order, rng = list(range(SAMPLES)), self.rng
        if "spawns" in self.kind:
            rng = numpy.random.default_rng(rng.spawn(1)[0])
        elif self.kind == "held":
            rng = rng["rngs"][0][0]
        rng.shuffle(order)
        return iter(order)


class Counts(Sampler[int]):
    """Knows the epoch by counting."""

    epochs = 0

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epochs)
        self.epochs += 1
        return iter(torch.randperm(SAMPLES, generator=generator).tolist())


class Keeps(Sampler[int]):
    """Keeps what it has drawn last in a state of its own."""

    def __init__(self) -> None:
        self.order = torch.arange(SAMPLES)

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self):
        self.order = self.order.roll(3).flip(0)[torch.arange(SAMPLES) ^ 1]
        return iter(self.order.tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = state["order"]


class Reorders(Sampler[int]):
    """Goes on from the order of the epoch before, which it keeps in some collection."""

    def __init__(self, order: Any) -> None:
        self.order = order

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self):
        if isinstance(self.order, list):
            random.shuffle(self.order)
        elif isinstance(self.order, deque):
            self.order.rotate(3)
        else:
            self.order = self.order[[*range(3, SAMPLES), 0, 1, 2]]
        return iter([int(index) for index in self.order])


class Shelves(Sampler[list[int]]):
    """Batches of what is alike, shuffled in place, and within them."""

    def __init__(self) -> None:
        self.buckets: Any = {odd: list(range(odd, SAMPLES, 2)) for odd in (0, 1)}
        self.kept: Any = None

    def __len__(self) -> int:
        return SAMPLES // 2

    def __iter__(self):
        for bucket in self.buckets.values():
            random.shuffle(bucket)
        batches = [bucket[i : i + 2] for bucket in self.buckets.values() for i in range(0, len(bucket), 2)]
        self.kept = batches if self.kept is None else [sorted(batch) for batch in self.kept]
        return iter(batches)


class Order:
    def __init__(self) -> None:
        self.rng, self.turns = numpy.random.RandomState(3), 0

    def next(self) -> list[int]:
        self.turns += 1
        return numpy.roll(self.rng.permutation(SAMPLES), self.turns).tolist()


class Helped(Sampler[int]):
    """What it knows is in an object of the user's, and it has no `__dict__`."""

    __slots__ = ("helper",)

    def __init__(self) -> None:
        self.helper = Order()

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self):
        return iter(self.helper.next())


class Pairs(Sampler[list[int]]):
    """A batch sampler over a sampler."""

    def __init__(self, sampler: Any) -> None:
        self.inner = sampler

    def __len__(self) -> int:
        return SAMPLES // 2

    def __iter__(self):
        order = list(self.inner)
        yield from ([*order[i : i + 1], order[-1 - i]] for i in range(SAMPLES // 2))


class Unending(Sampler[list[int]]):
    """A batch sampler without a length, or an end."""

    def __init__(self, own: bool) -> None:
        self.rng = random.Random(5) if own else random

    def __iter__(self):
        while True:
            yield [self.rng.randrange(SAMPLES) for _ in range(2)]


def by(sampler: Any) -> dict[str, Any]:
    return {"batch_size": 2, "sampler": sampler}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


#: kind of sampler: the loader's arguments, made anew in each "process"
SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "in order": lambda: {"batch_size": 2},
    "shuffle": lambda: {"batch_size": 2, "shuffle": True},
    "shuffle, generator": lambda: {"batch_size": 2, "shuffle": True, "generator": generator()},
    "random": lambda: by(RandomSampler(range(SAMPLES), generator=generator())),
    "with replacement": lambda: by(RandomSampler(range(SAMPLES), True, SAMPLES, generator())),
    "subset": lambda: by(SubsetRandomSampler(range(SAMPLES), generator())),
    "weighted": lambda: by(WeightedRandomSampler([1.0] * SAMPLES, SAMPLES, generator=generator())),
    "own, torch": lambda: by(Drawn("torch")),
    "own, numpy": lambda: by(Drawn("numpy")),
    "own, numpy legacy": lambda: by(Drawn("numpy legacy")),
    "own, python": lambda: by(Drawn("python")),
    "own, spawns": lambda: by(Drawn("spawns")),
    "own, spawns too": lambda: by(Drawn("spawns too")),
    "own, held": lambda: by(Drawn("held")),
    "counts": lambda: by(Counts()),
    "state": lambda: by(Keeps()),
    "in place": lambda: by(Reorders(list(range(SAMPLES)))),
    "in place, deque": lambda: by(Reorders(deque(range(SAMPLES)))),
    "array": lambda: by(Reorders(numpy.arange(SAMPLES))),
    "tensor": lambda: by(Reorders(torch.arange(SAMPLES))),
    "buckets": lambda: {"batch_sampler": Shelves()},
    "helped": lambda: by(Helped()),
    "batches": lambda: {"batch_sampler": BatchSampler(Drawn("numpy"), 2, False)},
    "own batches": lambda: {"batch_sampler": Pairs(Drawn("python"))},
    "own batches, counts": lambda: {"batch_sampler": Pairs(Counts())},
    "own batches, state": lambda: {"batch_sampler": Pairs(Keeps())},
    "unbatched": lambda: {"batch_size": None, "sampler": Drawn("torch")},
    "unending": lambda: {"batch_sampler": Unending(True)},
    "unending, global": lambda: {"batch_sampler": Unending(False)},
}


def feed(options: dict[str, Any], rank: int = 0, world: int = 1, data: Any = range(SAMPLES), **settings: Any) -> Feed:
    return Feed(DataLoader(data, **options), "train", Share(rank, world), 3, build_settings(**settings))


def read(source: Feed, epoch: int, skip: int = 0) -> list[Any]:
    source.begin(epoch)
    source.draw()
    found: list[Any] = []
    for index, batch in enumerate(source.start(epoch, skip), skip):
        if index == (source.length or 8):
            break
        found.append(batch.tolist() if isinstance(batch, torch.Tensor) else batch)
    return found


@pytest.mark.sample(20)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_resumed_run_reads_the_very_samples(kind, world):
    """In any epoch, from any batch on; and workers read disjoint parts, whatever their generators held."""
    if "unending" in kind and world > 1:
        return  # refused, since it has no length
    undisturbed = [feed(SAMPLERS[kind](), rank, world) for rank in range(world)]
    states, epochs = [], []
    for epoch in range(3):
        epochs.append([read(part, epoch) for part in undisturbed])
        states.append([part.state() for part in undisturbed])
    if "in order" not in kind:
        assert epochs[0] != epochs[1] != epochs[2]
    for epoch, parts in enumerate(epochs):
        samples = [batch if isinstance(batch, int) else tuple(batch) for part in parts for batch in part]
        assert len(samples) == (16 if kind == "unbatched" else 8)
        if kind not in ("with replacement", "weighted") and "unending" not in kind:
            flat = [i for s in samples for i in (s if isinstance(s, tuple) else (s,))]
            assert sorted(flat) == list(range(SAMPLES))
        for skip in (1, 3, 4) if world == 1 else (0, 1, 3):
            random.seed(skip)
            torch.manual_seed(skip)
            again = [feed(SAMPLERS[kind](), rank, world) for rank in range(world)]
            for part, state in zip(again, states[epoch], strict=True):
                part.take_state(state)
            assert [read(part, epoch, skip) for part in again] == [part[skip:] for part in parts], (epoch, skip)
            if epoch < 2:  # and goes on like it
                assert [read(part, epoch + 1) for part in again] == epochs[epoch + 1]
        if epoch < 2:  # from the end of an epoch
            again = [feed(SAMPLERS[kind](), rank, world) for rank in range(world)]
            for part, state in zip(again, states[epoch], strict=True):
                part.take_state(state)
            assert [read(part, epoch + 1) for part in again] == epochs[epoch + 1]


@pytest.mark.parametrize("kind", ["in place", "counts", "state", "buckets", "helped"])
def test_another_number_of_workers_goes_on_with_what_samplers_know(kind):
    """In the middle of an epoch, and from its end; what each had differently is not handed on."""
    two = [feed(SAMPLERS[kind](), rank, 2) for rank in range(2)]
    one = feed(SAMPLERS[kind]())
    for epoch in range(2):
        for part in (*two, one):
            read(part, epoch)
    handed = of_all_workers([part.state() for part in two])
    again = feed(SAMPLERS[kind]())
    again.take_state(handed)
    assert read(again, 2) == read(one, 2)
    again = feed(SAMPLERS[kind]())
    again.take_state(handed)
    again.begin(1, ((2, 2),))
    again.draw()
    unbroken = feed(SAMPLERS[kind]())
    read(unbroken, 0)
    order = [index for batch in read(unbroken, 1) for index in batch]
    assert sorted(index for batch in again.start(1) for index in batch.tolist()) == sorted(order[8:])
    states: list[Any] = [part.state() for part in two]
    states[1]["now"] = []
    assert of_all_workers(states) is None


def test_an_order_that_cannot_be_drawn_again_is_told(caplog):
    hidden = numpy.random.default_rng(4)

    class Hidden(Drawn):
        def __init__(self) -> None:
            self.count = 0

        def __iter__(self):
            return iter(hidden.permutation(SAMPLES).tolist())

    whole = feed(by(Hidden()))
    read(whole, 0)
    for told, state in ((True, whole.state()), (False, feed(by(Hidden())).state())):
        caplog.clear()
        again = feed(by(Hidden()))
        again.take_state(state)
        with caplog.at_level(logging.WARNING, "raytrainer"):
            read(again, 0, 3)
        assert ("Hidden has drawn another order for this epoch" in caplog.text) == told


def test_a_longer_dataset_keeps_its_own_order():
    """What a sampler had kept is of as many samples as there were."""
    whole = feed(by(Reorders(list(range(SAMPLES)))))
    read(whole, 0)
    longer = Reorders(list(range(2 * SAMPLES)))
    again = feed(by(longer), data=range(2 * SAMPLES))
    again.take_state(whole.state())
    again.begin(1)
    assert longer.order == list(range(2 * SAMPLES))


class Noisy(Dataset[Any]):
    """Draws something for each sample."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (list, tuple)) or getattr(index, "ndim", 0):
            return torch.stack([self[int(each)] for each in index])
        return torch.tensor([float(index), torch.rand(()).item(), random.random(), numpy.random.rand()])


class Formed(Pairs):
    """Batches that are no lists."""

    def __init__(self, form: Callable[[list[int]], Any]) -> None:
        super().__init__(Drawn("python"))
        self.form = form

    def __iter__(self):
        return iter([self.form(batch) for batch in super().__iter__()])


#: what a loader asks its processes for: its arguments
ASKED: dict[str, Callable[[], dict[str, Any]]] = {
    "lists": lambda: {"batch_sampler": Formed(list)},
    "tuples": lambda: {"batch_sampler": Formed(tuple)},
    "arrays": lambda: {"batch_sampler": Formed(numpy.array)},
    "tensors": lambda: {"batch_sampler": Formed(torch.tensor)},
    "indices": lambda: {"batch_size": None, "sampler": Drawn("numpy")},
    "lists, unbatched": lambda: {"batch_size": None, "sampler": Formed(list)},
}


@pytest.mark.parametrize("kind", ASKED)
def test_what_processes_draw_depends_on_the_batch_alone(kind):
    """Whatever the loader asks for; with another number of processes, and from any batch on."""

    def read(processes: int, skip: int = 0) -> list[Any]:
        source = feed({**ASKED[kind](), "num_workers": processes}, data=Noisy())
        source.begin(1)
        source.draw()
        found = [batch.tolist() for batch in source.start(1, skip)]
        source.close()
        return found

    whole = read(1)
    assert len(whole) == (SAMPLES if kind == "indices" else SAMPLES // 2)
    assert read(2, 3) == whole[3:]


class Lin(rt.Module):
    """Linear regression that remembers how it went."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        nn.init.ones_(self.net.weight)
        self.lengths: list[int] = []
        self.validated: list[tuple[int, int]] = []
        self.batches = 0

    def training_step(self, batch, batch_idx):
        self.batches = batch_idx + 1
        return F.mse_loss(self.net(batch[0]), batch[1])

    def on_train_epoch_end(self):
        self.lengths.append(self.batches)

    def on_validation_start(self):
        self.validated.append((self.current_epoch, self.batches))

    def validation_step(self, batch, batch_idx):
        self.log("first", batch[0].max())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))
TABLE = TensorDataset(x, x.sum(1, keepdim=True))


@pytest.mark.sample(9)
@pytest.mark.parametrize("kind", [k for k in SAMPLERS if "unending" not in k and k != "unbatched"])
def test_weights_of_a_resumed_run(kind, local_trainer, tmp_path):
    """From a checkpoint in the middle of the second epoch of three."""
    every = rt.ModelCheckpoint(tmp_path, every_n_train_steps=11, save_top_k=-1, filename="{step}")
    whole, resumed = Lin(), Lin()
    local_trainer(max_epochs=3, seed=3, callbacks=[every]).fit(whole, DataLoader(TABLE, **SAMPLERS[kind]()))
    local_trainer(max_epochs=3, seed=3).fit(
        resumed, DataLoader(TABLE, **SAMPLERS[kind]()), ckpt_path=tmp_path / "step=11.ckpt"
    )
    assert torch.equal(whole.net.weight, resumed.net.weight) and torch.equal(whole.net.bias, resumed.net.bias)


# ---------------------------------------------------------------- lengths


class Buckets(Sampler[list[int]]):
    """4 batches in even epochs, 6 in odd ones."""

    def __init__(self, at_once: bool = True) -> None:
        self.epoch: int | None = None
        self.batches: list[list[int]] = []
        self.at_once = at_once

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if self.at_once:
            self._make()

    def _make(self) -> None:
        assert self.epoch is not None, "asked before it knows its epoch"
        self.batches = [[i, i + 1] for i in range(4 if self.epoch % 2 == 0 else 6)]

    def __len__(self) -> int:
        assert self.epoch is not None, "asked before it knows its epoch"
        return len(self.batches) or 5

    def __iter__(self):
        self._make()
        return iter(self.batches)


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "when drawn"])
def test_a_number_of_batches_that_changes(at_once, local_trainer):
    module = Lin()
    trainer = local_trainer(max_epochs=4, val_check_interval=0.5, accumulate_grad_batches=4)
    trainer.fit(module, DataLoader(TABLE, batch_sampler=Buckets(at_once)), DataLoader(TABLE, 8))
    assert module.lengths == [4, 6, 4, 6]
    assert module.validated == [(0, 0), (0, 2), (0, 4), (1, 3), (1, 6), (2, 2), (2, 4), (3, 3), (3, 6)]
    assert trainer.global_step == 1 + 2 + 1 + 2  # the last batch of an epoch steps


def test_limits_follow_it(local_trainer):
    module = Lin()
    local_trainer(max_epochs=4, limit_train_batches=0.5).fit(module, DataLoader(TABLE, batch_sampler=Buckets()))
    assert module.lengths == [2, 3, 2, 3]


@pytest.mark.parametrize("world", [2, 3])
def test_it_is_right_on_several_workers(world):
    parts = [feed({"batch_sampler": Buckets()}, rank, world) for rank in range(world)]
    for epoch, batches in enumerate((4, 6, 4)):
        found = [read(part, epoch) for part in parts]
        assert {part.length for part in parts} == {len(f) for f in found} == {-(-batches // world)}
        assert {tuple(b) for f in found for b in f} == {(i, i + 1) for i in range(batches)}


def test_the_steps_of_a_whole_run(local_trainer):
    class Plans(Lin):
        def configure_optimizers(self):
            self.planned = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    module = Plans()
    trainer = local_trainer(max_epochs=4)
    trainer.fit(module, DataLoader(TABLE, batch_sampler=Buckets()))
    assert module.planned == trainer.global_step == 20


class Twice:
    """Repeats for ever, as loaders do that spare the start of their processes, but says how many there are."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self):
        while True:
            yield from self.sampler


def test_a_sampler_without_an_end_is_read_as_far_as_it_is_long():
    assert [i for batch in read(feed(by(Twice(range(SAMPLES)))), 0) for i in batch] == list(range(SAMPLES))


@pytest.mark.parametrize("name", ["source", "sampler", "batch_sampler"])
@pytest.mark.parametrize(
    "held",
    [torch.arange(SAMPLES), numpy.arange(SAMPLES), None],
    ids=["tensor", "array", "nested tensor"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_attributes_that_are_no_samplers(name, held):
    if held is None:
        held = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])

    class Sub(Sampler[int]):
        def __init__(self) -> None:
            setattr(self, name, held)

        def __len__(self) -> int:
            return SAMPLES

        def __iter__(self):
            return iter(range(SAMPLES) if held.ndim == 2 else getattr(self, name).tolist())

    source = feed(by(Sub()))
    assert [i for batch in read(source, 0) for i in batch] == list(range(SAMPLES))
    assert source.state() is not None


# ---------------------------------------------------------------- the user's dataset in loader processes


class Files(Dataset[Any]):
    shift, handle = 0, None

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((4,), float(index + self.shift)), torch.ones(1)


def opened(worker: int) -> None:
    info = get_worker_info()
    assert info is not None and type(info.dataset) is Files
    info.dataset.shift = 100


@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle": True}, {"batch_sampler": BatchSampler(range(4), 2, False)}],
    ids=["plain", "shuffle", "own"],
)
def test_worker_init_fn_gets_the_users_dataset(options, local_trainer):
    size = {} if "batch_sampler" in options else {"batch_size": 2}
    loader = DataLoader(Files(), num_workers=1, worker_init_fn=opened, **size, **options)
    (metrics,) = local_trainer(logger=False).validate(Lin(), loader, verbose=False)
    assert metrics["first"] == 102 or ("shuffle" in options and metrics["first"] > 101)
    local_trainer(max_epochs=2).fit(Lin(), loader)
