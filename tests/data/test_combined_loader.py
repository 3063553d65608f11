"""Several loaders as one: how their batches come together, sharded, limited, and restartable at any batch."""

from __future__ import annotations

import contextlib
import re
from collections import Counter, namedtuple
from typing import Any

import pytest
import torch
from tiny import Tiny
from torch.utils.data import DataLoader, IterableDataset

import raytrainer as rt
from raytrainer.data.combined_feed import CombinedFeed, make_feed
from raytrainer.data.combined_loader import MODES, as_combined, as_list
from raytrainer.data.look_ahead import LookAhead
from raytrainer.data.sharding import Share
from raytrainer.errors import ConfigurationError, DataError
from raytrainer.plan.settings import build_settings

try:  # here, since it sets an environment variable, which no test may do
    from lightning.pytorch.utilities import CombinedLoader as Theirs
except ImportError:
    Theirs = None

Pair = namedtuple("Pair", "a b")


class Stream(IterableDataset[Any]):
    """Numbers from `start` on; without a length."""

    def __init__(self, start: int, count: int) -> None:
        self.start, self.count = start, count

    def __iter__(self) -> Any:
        return iter(range(self.start, self.start + self.count))


def loader(start: int, count: int, size: int = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(range(start, start + count), size, **options)  # type: ignore[arg-type]


def stream(start: int, count: int, size: int = 2) -> DataLoader[Any]:
    return DataLoader(Stream(start, count), size)


def feed(given: Any, stage: str = "train", share: Share = Share(0, 1), **options: Any) -> CombinedFeed:  # noqa: B008
    made = make_feed(as_combined(given), stage, share, 3, build_settings(**options))
    assert isinstance(made, CombinedFeed)
    return made


def plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {key: plain(item) for key, item in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [plain(item) for item in batch]
    return batch


def read(given: CombinedFeed, epoch: int = 0, skip: int = 0) -> list[Any]:
    """What the training loop would use."""
    iterator = given.start(epoch, skip)
    assert isinstance(iterator, LookAhead)
    batches: list[Any] = []
    while given.length is None or skip + len(batches) < given.length:
        batch = next(iterator, None)
        if batch is None:
            break
        batches.append(plain(batch))
    return batches


def forms(a: Any, b: Any, c: Any) -> list[Any]:
    return [{"a": a, "b": b}, [a, b], (a, b), Pair(a, b), {"x": [a, {"y": b}], "z": c}, [a], {"only": c}]


EXPECTED = {
    "min_size": [[[0, 1], [10, 11]], [[2, 3], [12]]],
    "max_size": [[[0, 1], [10, 11]], [[2, 3], [12]], [[4, 5], None], [[6], None]],
    "max_size_cycle": [[[0, 1], [10, 11]], [[2, 3], [12]], [[4, 5], [10, 11]], [[6], [12]]],
    "sequential": [[0, 1], [2, 3], [4, 5], [6], [10, 11], [12]],
}


@pytest.mark.parametrize("make", [loader, stream, lambda *args: [torch.tensor(b) for b in loader_lists(*args)]])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, make: Any) -> None:
    combined = rt.CombinedLoader([make(0, 7), make(10, 3)], mode)
    assert read(feed(combined)) == read(feed(combined, "val")) == EXPECTED[mode]
    assert [plain(batch) for batch, _, _ in combined] == EXPECTED[mode]
    if make is not stream:
        assert len(combined) == feed(combined).length == len(EXPECTED[mode])


def loader_lists(start: int, count: int) -> list[list[int]]:
    return [list(range(i, min(i + 2, start + count))) for i in range(start, start + count, 2)]


@pytest.mark.skipif(Theirs is None, reason="needs lightning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", range(7))
def test_as_lightning_has_it(mode: str, number: int) -> None:
    given = forms(loader(0, 7), loader(10, 3), loader(20, 4))[number]
    theirs = Theirs(given, mode)
    wanted = [(plain(batch), index, which) for batch, index, which in theirs]
    assert [(plain(batch), index, which) for batch, index, which in rt.CombinedLoader(given, mode)] == wanted
    assert read(feed(theirs)) == [batch for batch, _, _ in wanted]


def test_forms_keep_their_types() -> None:
    a, b, c = loader(0, 2), loader(10, 2), loader(20, 2)
    for given in forms(a, b, c):
        (batch,) = list(feed(given).start(0))
        assert type(batch) is type(given)
    assert plain(next(feed({"x": [a, {"y": b}], "z": c}).start(0))) == {"x": [[0, 1], {"y": [10, 11]}], "z": [20, 21]}
    inner = rt.CombinedLoader([a, b], "sequential")
    assert read(feed({"i": inner, "c": loader(20, 4)})) == [
        {"i": [0, 1], "c": [20, 21]},
        {"i": [10, 11], "c": [22, 23]},
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_loader_is_sharded(world: int, shuffle: bool) -> None:
    parts = [feed([loader(0, 12, shuffle=shuffle), loader(50, 6, 1)], share=Share(r, world)) for r in range(world)]
    batches = [read(part, epoch=2) for part in parts]
    assert len({len(part) for part in batches}) == 1
    first = Counter(x for part in batches for pair in part for x in pair[0])
    second = Counter(x for part in batches for pair in part for x in pair[1])
    assert set(first) == set(range(12)) and set(second) == set(range(50, 56))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("mode", ["min_size", "max_size"])
def test_another_batch_size_goes_on(mode: str, world: int) -> None:
    """Two workers have done three batches of 4 and 2; others go on with as many samples on all of them together."""

    def parts(workers: int) -> list[CombinedFeed]:
        sizes = 8 // workers, 4 // workers
        given = [loader(0, 48, sizes[0], shuffle=True), loader(100, 24, sizes[1], shuffle=True)]
        return [feed(rt.CombinedLoader(given, mode), share=Share(rank, workers)) for rank in range(workers)]

    seen: Counter[int] = Counter()
    for workers, before, batches in ((2, (), 3), (world, ((2, 3, 6),), 100)):
        for part in parts(workers):
            assert part.batch_size == 12 // workers
            part.begin(1, before)
            part.draw()
            seen.update(x for joint in read(part, epoch=1)[:batches] for each in joint for x in each or ())
    assert seen == Counter([*range(48), *range(100, 124)])


def test_a_loader_that_begins_anew_is_in_another_order() -> None:
    batches = read(feed([loader(0, 24, 3), loader(50, 4, 2, shuffle=True)]))
    passes = [[x for pair in batches[i : i + 2] for x in pair[1]] for i in range(0, 8, 2)]
    assert all(sorted(p) == [50, 51, 52, 53] for p in passes) and len({tuple(p) for p in passes}) > 1
    epochs = [read(feed([loader(0, 24, 3), loader(50, 4, 2, shuffle=True)]), epoch) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_going_on_at_any_batch(mode: str, processes: int) -> None:
    def make() -> CombinedFeed:
        first = loader(0, 7, shuffle=True, num_workers=processes)
        return feed(rt.CombinedLoader({"a": first, "b": loader(10, 3, shuffle=True)}, mode))

    def read_and_close(skip: int = 0) -> list[Any]:
        with contextlib.closing(make()) as made:
            return read(made, 1, skip)

    whole = read_and_close()
    for skip in range(len(whole)) if not processes else (len(whole) - 1,):
        assert read_and_close(skip) == whole[skip:]


class Counting(IterableDataset[Any]):
    """A stream with a state; it must not be read again."""

    reads = 0

    def __init__(self, start: int, count: int) -> None:
        self.numbers, self.at = range(start, start + count), 0

    def __iter__(self) -> Any:
        while self.at < len(self.numbers):
            self.at += 1
            Counting.reads += 1
            yield self.numbers[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("mode", MODES)
def test_streams_go_on_from_their_states(mode: str) -> None:
    def make() -> CombinedFeed:
        return feed(rt.CombinedLoader([DataLoader(Counting(0, 12), 2), DataLoader(Counting(50, 5), 2)], mode))

    whole = read(make())
    for skip in range(1, len(whole)):
        first = make()
        iterator = first.start(0)
        assert isinstance(iterator, LookAhead)
        for index in range(skip):
            iterator.keeping = index == skip - 1
            next(iterator)
        state = first.state()
        second = make()
        second.take_state(state)
        second.begin(0)
        Counting.reads = 0
        assert read(second, 0, skip) == whole[skip:]
        assert Counting.reads <= len(re.findall(r"\d+", str(whole[skip:]))) + 4  # each reads one batch ahead


@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (3, 3), (0.5, 2), (99, 4), (1.0, 4)])
def test_limits_are_on_what_comes_of_them(limit: Any, batches: int) -> None:
    given = feed([loader(0, 7), loader(10, 3)], limit_train_batches=limit)
    assert given.length == batches and len(read(given)) == batches


def test_what_is_not_several_loaders() -> None:
    tensors = [torch.zeros(2), torch.zeros(2)]
    for single in (
        loader(0, 2),
        tensors,
        tuple(tensors),
        {"x": torch.zeros(2)},
        [{"x": torch.zeros(2)}],
        iter([1]),
        [],
    ):
        assert as_combined(single) is None
    with pytest.raises(ConfigurationError, match="several loaders or one loader's batches"):
        as_combined([tensors, tensors])
    with pytest.raises(ConfigurationError, match=r"mode='longest'.*max_size_cycle"):
        rt.CombinedLoader([loader(0, 2)], "longest")
    with pytest.raises(ConfigurationError, match="at least one"):
        rt.CombinedLoader([])


def test_evaluation_takes_lists_one_after_the_other() -> None:
    a, b, c = loader(0, 2), loader(10, 2), loader(20, 2)
    assert as_list({"x": [a, b], "y": c}) == as_list(rt.CombinedLoader([[a, b], c], "sequential")) == [a, b, c]
    combined = rt.CombinedLoader([a, b])
    assert as_list(combined) == [combined]


def test_a_loader_that_can_be_read_once() -> None:
    with pytest.raises(DataError, match="begins anew"):
        read(feed([stream(0, 9), iter([torch.zeros(1)])]))


def test_an_empty_loader(caplog: pytest.LogCaptureFixture) -> None:
    for mode, batches in (("min_size", 0), ("max_size_cycle", 0), ("max_size", 2), ("sequential", 2)):
        given = feed(rt.CombinedLoader([loader(0, 4), loader(0, 0)], mode))
        assert (given.length, given.nothing) == (batches, batches == 0)
    assert "has no batch" in caplog.text


class Both(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(plain(batch))
        return super().training_step((torch.ones(2, 4), torch.rand(2, 2)), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(plain(batch))


def test_fit_and_resume(local_trainer: Any, tmp_path: Any) -> None:
    """A run that goes on in the middle of an epoch reads, and draws, what the undisturbed one does."""

    def data() -> Any:
        return {"a": loader(0, 10, shuffle=True), "b": loader(50, 4, shuffle=True)}

    saving = rt.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    whole = Both()
    local_trainer(max_epochs=3, seed=1, callbacks=saving).fit(whole, data())
    assert len(whole.seen) == 15 and all(set(batch) == {"a", "b"} for batch in whole.seen)
    for step in (3, 6, 9, 12):
        later = Both()
        local_trainer(max_epochs=3, seed=1).fit(later, data(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert later.seen == whole.seen[step:]
        assert torch.equal(later.layer.weight, whole.layer.weight)


def test_validation_of_a_combination(local_trainer: Any) -> None:
    module = Both()
    combined = rt.CombinedLoader({"a": loader(0, 4), "b": loader(10, 2)}, "max_size")
    local_trainer().validate(module, combined)
    assert module.seen == [{"a": [0, 1], "b": [10, 11]}, {"a": [2, 3], "b": None}]
