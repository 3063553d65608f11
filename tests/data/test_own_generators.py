"""Generators of datasets and of what collates: a resumed run draws from them what the undisturbed one draws."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy
import pytest
import torch
from tiny import Tiny
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate

import raytrainer as rt
from raytrainer.data.epoch_state import of_all_workers
from raytrainer.data.feed import Feed
from raytrainer.data.own_generators import put_back, reseed, states_of
from raytrainer.data.sharding import Share
from raytrainer.plan.settings import build_settings

SAMPLES = 12

GENERATORS: dict[str, Any] = {
    "torch": lambda: torch.Generator().manual_seed(3),
    "random": lambda: random.Random(3),
    "numpy": lambda: numpy.random.default_rng(3),
    "numpy, Philox": lambda: numpy.random.Generator(numpy.random.Philox(3)),
    "numpy, legacy": lambda: numpy.random.RandomState(3),
    "numpy, seeds": lambda: numpy.random.SeedSequence(3),
}


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    if isinstance(generator, numpy.random.SeedSequence):
        generator = numpy.random.default_rng(generator.spawn(1)[0])
    return float(generator.random())


class Noise:
    """A transform; it makes its generator when that is first wanted."""

    def __init__(self, kind: str, at_once: bool = True) -> None:
        self.kind, self.rng = kind, GENERATORS[kind]() if at_once else None

    def __call__(self, value: Any) -> Any:
        if self.rng is None:
            self.rng = GENERATORS[self.kind]()
        return value + draw(self.rng)


class Samples(Dataset[Any]):
    def __init__(self, transform: Any) -> None:
        self.transforms = [transform]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return functools.reduce(lambda value, transform: transform(value), self.transforms, float(index))


def noisy_collate(rng: Any, rows: Any) -> Any:
    return default_collate(rows) + draw(rng)


class Collates:
    def __init__(self) -> None:
        self.rng = random.Random(3)

    def collate(self, rows: Any) -> Any:
        return noisy_collate(self.rng, rows)

    __call__ = collate


def plain() -> Any:
    return Samples(float)


#: Where the generator is: the loader's dataset and collate_fn, made anew in each "process".
PLACES: dict[str, Any] = {
    **{f"transform, {kind}": lambda kind=kind: {"dataset": Samples(Noise(kind))} for kind in GENERATORS},
    **{f"made late, {kind}": lambda kind=kind: {"dataset": Samples(Noise(kind, False))} for kind in GENERATORS},
    "parts": lambda: {"dataset": ConcatDataset([Subset(Samples(Noise("random")), range(SAMPLES))])},
    "collates": lambda: {"dataset": plain(), "collate_fn": Collates()},
    "method": lambda: {"dataset": plain(), "collate_fn": Collates().collate},
    "partial": lambda: {"dataset": plain(), "collate_fn": functools.partial(noisy_collate, random.Random(3))},
}


def feed(place: str, processes: int, rank: int = 0, world: int = 1) -> Feed:
    loader = DataLoader(**PLACES[place](), batch_size=2, shuffle=True, num_workers=processes)
    return Feed(loader, "train", Share(rank, world), 3, build_settings())


def read(source: Feed, epoch: int, skip: int, until: int | None = None) -> list[Any]:
    source.begin(epoch)
    source.draw()
    batches = source.start(epoch, skip)
    return [next(batches).tolist() for _ in range(skip, source.length if until is None else until)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "processes"), [*((place, 0) for place in PLACES), *((place, 1) for place in PLACES if "," not in place)]
)
def test_a_resumed_run_draws_the_same(place, processes):
    """Within an epoch, and from its end; in processes, where each batch has its own seed, epochs differ too."""
    whole = feed(place, processes)
    epochs, states = [read(whole, 0, 0)], [whole.state()]
    epochs.append(read(whole, 1, 0, 2))
    states.append(whole.state())
    whole.close()
    whole = feed(place, processes)
    whole.take_state(states[0])
    epochs.append(read(whole, 1, 0))
    assert epochs[2][:2] == epochs[1]
    again = feed(place, processes)
    again.take_state(states[1])
    assert read(again, 1, 2) == epochs[2][2:]
    noise = [sorted(value % 1 for batch in epoch for value in batch) for epoch in (epochs[0], epochs[2])]
    assert noise[0] != noise[1]
    whole.close()
    again.close()


class Sums(Tiny):
    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), batch.tolist()]
        return self.layer.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass


class Unsized:
    """A batch sampler whose end shows when it is there: a batch is read ahead."""

    def __iter__(self):
        yield from ([index, index + 1] for index in range(0, SAMPLES, 2))


def test_so_it_does_where_a_batch_is_read_ahead(local_trainer, tmp_path):
    def fit(steps: int, **options: Any) -> list[Any]:
        loader = DataLoader(Samples(Noise("random")), batch_sampler=Unsized())  # type: ignore[arg-type]
        saving = rt.ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=steps)
        module = Sums()
        local_trainer(max_steps=steps, seed=1, callbacks=saving).fit(module, loader, **options)
        return module.seen

    whole, first = fit(9), fit(3)
    assert whole == [*first, *fit(9, ckpt_path=tmp_path / "step=3.ckpt")]


@pytest.mark.parametrize("several", [False, True])
def test_the_sanity_check_leaves_no_trace(several, local_trainer):
    """Also where training and validation read one and the same dataset."""
    seen = []
    for batches in (0, 2):
        loader = DataLoader(Samples(Noise("random")), 2, collate_fn=Collates())
        module = Sums()
        local_trainer(max_epochs=1, limit_train_batches=3, num_sanity_val_steps=batches).fit(
            module, loader, [loader, rt.CombinedLoader([loader, loader], "min_size")] if several else loader
        )
        seen.append(module.seen)
    assert seen[0] == seen[1]


def test_other_workers_draw_their_own():
    """What samplers know is handed on to another number of workers; where generators are is each worker's own."""
    parts = [feed("transform, random", 0, rank, 2) for rank in range(2)]
    for part in parts:
        read(part, 0, 0)
    handed = of_all_workers([part.state() for part in parts])
    assert handed is not None
    assert handed["drawn"] == []


def test_states_of_other_objects_are_left_out():
    states = states_of([Samples(Noise("torch"))])
    others = [Samples(Noise("random")), Samples(float), Samples(Noise("numpy", at_once=False))]
    others[0].transforms[0].rng.seed(5)
    before = others[0].transforms[0].rng.getstate()
    for other in others:
        put_back([other], states)
    assert others[0].transforms[0].rng.getstate() == before


@pytest.mark.parametrize("kind", GENERATORS)
def test_seeded_anew(kind):
    one, other = GENERATORS[kind](), GENERATORS[kind]()
    draw(one)
    for generator in (one, other):
        reseed(generator, 5)
    assert [draw(one) for _ in range(3)] == [draw(other) for _ in range(3)]
