"""Streams that know where they are: their states are taken and put back, instead of reading from the beginning again.

A state is always that after the batches handed out so far, whatever processes have read ahead.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from raytrainer.data.memories import has_state
from raytrainer.data.shared_streams import SharedStream, is_shared
from raytrainer.plan.seeds import derive_seed
from raytrainer.seeding import seed_generators

__all__ = ["BegunAlike", "DatasetStream", "LoaderStream", "ProcessesStream", "Requests", "Stream", "stream_of"]


class LoaderStream:
    """A loader with a state of its own: torchdata's, litdata's, a user's."""

    kind = "loader"

    def __init__(self, loader: Any) -> None:
        self.loader = self.owner = loader
        self.processes = getattr(loader, "num_workers", 0)

    def begin(self, epoch: int) -> None:
        """An epoch begins where the loader begins."""

    @property
    def counts_epochs(self) -> bool:
        """Whether epochs are counted where only its state tells, and a state may be of an epoch's end."""
        return type(self.loader).__module__.startswith("torchdata.nodes.")

    def follow(self, state: Any) -> None:
        """Have the loader begin the epoch after the one that a state is of.

        The first iteration goes on from the state, or begins the next epoch where that is at its end; the second begins
        the next epoch, unless the first did. Its state goes into the loader, which otherwise gives that of the end
        until the run is over (torchdata 0.11).
        """
        self.load(state)
        iter(self.loader)
        iter(self.loader)
        self.load({"root": self.loader.root.state_dict(), "num_yielded": 0})

    def state(self) -> Any:
        """None where there is only a number of batches: torchdata's loader would read an epoch again, without seeds."""
        state = self.loader.state_dict()
        return state if not isinstance(self.loader, DataLoader) or _knows_more(state) else None

    def load(self, state: Any) -> None:
        self.loader.load_state_dict(state)

    def read(self, iterator: Iterator[Any]) -> Iterator[Any]:
        return iterator


class DatasetStream:
    """An iterable dataset with a state, read in this process."""

    kind = "dataset"
    processes = 0

    def __init__(self, dataset: Any) -> None:
        self.dataset = self.owner = dataset

    def begin(self, epoch: int) -> None:
        """An epoch begins where the dataset begins."""

    def state(self) -> Any:
        return self.dataset.state_dict()

    def load(self, state: Any) -> None:
        self.dataset.load_state_dict(state)

    def read(self, iterator: Iterator[Any]) -> Iterator[Any]:
        return iterator


class ProcessesStream:
    """An iterable dataset with a state, read by a loader's processes: each has a copy, which sends its state along.

    Args:
        loader: A copy of the user's, which this may change.
    """

    kind = "processes"

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.processes, self.owner = loader, loader.num_workers, loader.dataset
        self._init = loader.worker_init_fn
        loader.collate_fn = _CollateWithState(loader.collate_fn)
        self.begin()

    def begin(self, epoch: int = 0) -> None:
        """An epoch begins where each process's dataset begins."""
        self.states: list[Any] = [None] * self.processes
        self.counts = [0] * self.processes

    def state(self) -> Any:
        return {"states": list(self.states), "counts": list(self.counts)}

    def load(self, state: Any) -> None:
        self.states, self.counts = list(state["states"]), list(state["counts"])
        self.loader.worker_init_fn = _LoadState(self._init, self.states)

    def read(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Take the states off the batches; after `load`, also put them in the order that they would have had."""
        self.loader.worker_init_fn = self._init  # the processes have been started
        for batch, worker, state in self._in_turn(iterator):
            self.states[worker] = state
            self.counts[worker] += 1
            yield batch

    def _in_turn(self, tagged: Iterator[Any]) -> Iterator[Any]:
        """A loader begins with its first process, also where some others are still to give a batch of this round."""
        most = max(self.counts)
        before = {worker for worker, count in enumerate(self.counts) if count == most and most}
        if len(before) == self.processes:
            before = set()
        held: list[Any] = []  # of the next round, from processes that were through with the last one
        latest = -1
        for item in tagged:
            worker = item[1]
            if worker <= latest:
                yield from held
                held = []
            latest = worker
            if worker in before:
                held.append(item)
            else:
                yield item
        yield from held


def _knows_more(state: Any) -> bool:
    """Whether there is a dataset's state, or its iterator's, in what torchdata's loader gives as its own.

    Where it has no place for such, it is of another library.
    """
    places = list(_found(state, ("dataset_state", "dataset_iter_state")))
    return not places or any(place is not None for place in places)


def _found(state: Any, names: tuple[str, ...]) -> Iterator[Any]:
    for name, value in state.items() if isinstance(state, dict) else ():
        if name in names:
            yield value
        else:
            yield from _found(value, names)


Stream = LoaderStream | DatasetStream | ProcessesStream | SharedStream


def stream_of(loader: Any) -> Stream | None:
    """What keeps the position of a loader (a copy of the user's); None: nothing that can be asked for it."""
    if not isinstance(loader, DataLoader):
        return LoaderStream(loader) if has_state(loader) else None
    dataset = loader.dataset
    if not isinstance(dataset, IterableDataset) or _forgets(dataset):
        return None
    if is_shared(dataset):
        return SharedStream(loader)
    if has_state(loader):
        return LoaderStream(loader)
    if not has_state(dataset):
        return None
    return ProcessesStream(loader) if loader.num_workers else DatasetStream(dataset)


def _forgets(dataset: Any) -> bool:
    """Whether a Hugging Face dataset's state lacks samples: those in a shuffle buffer, in old releases others too."""
    if type(dataset).__module__.startswith("datasets."):
        major = str(getattr(sys.modules.get("datasets"), "__version__", "")).partition(".")[0]
        if major.isdigit() and int(major) < 5:  # seen up to 4.6: what is left of a shard is left out
            return True
    part, seen = getattr(dataset, "_ex_iterable", None), 0
    while part is not None and seen < 64:
        if "BufferShuffled" in type(part).__name__:
            return True
        part, seen = getattr(part, "ex_iterable", None), seen + 1
    return False


class _CollateWithState:
    """A user's `collate_fn`, in a loader's process, and what the dataset's state is after the batch."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> tuple[Any, int, Any]:
        info = get_worker_info()
        assert info is not None
        dataset: Any = info.dataset
        state = copy.deepcopy(dataset.state_dict())
        return self.collate(samples), info.id, state


class _LoadState:
    """A user's `worker_init_fn`, and then the dataset's state put back."""

    def __init__(self, init: Callable[[int], Any] | None, states: list[Any]) -> None:
        self.init, self.states = init, states

    def __call__(self, worker: int) -> None:
        if self.init is not None:
            self.init(worker)
        info = get_worker_info()
        if info is not None and self.states[worker] is not None:
            dataset: Any = info.dataset
            dataset.load_state_dict(self.states[worker])


class BegunAlike:
    """In the place of no `worker_init_fn`: what `__iter__` draws in a process is the same in all of all workers."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, worker: int) -> None:
        seed_generators(self.seed)


class Requests(Sampler[Any]):
    """What a loader asks its processes for where the dataset is iterable: so many samples, with a seed.

    A process's randomness depends on (seed, process, batches that it has made), so that it can go on anywhere. Where
    processes persist, torch keeps what it asks for them by, so this is one object for all epochs.

    Args:
        samples: In a batch; None where the loader does not batch.
    """

    def __init__(self, samples: int | None) -> None:
        self.samples = samples
        self.begin(0, [], 0)

    def begin(self, seed: int, counts: list[int], first: int) -> None:
        """Ask with the seed of an epoch that begins, or goes on after so many batches of each process.

        Args:
            seed: Of this worker's processes.
            counts: Batches that each has made.
            first: The seed of the epoch's first batches, with which all processes of all workers draw the same.
        """
        self.request = _Request(self.samples, seed, counts, first)

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.request


class _Request:
    def __init__(self, samples: int | None, seed: int, counts: list[int], first: int) -> None:
        self.content = samples, seed, counts, first

    def __reduce__(self) -> Any:
        return _arrive, self.content


_served = (0, 0)  # in a loader's process: (seed, requests with it)


def _arrive(samples: int | None, seed: int, counts: list[int], first: int) -> Any:
    global _served
    info = get_worker_info()
    if info is not None:
        _served = seed, _served[1] + 1 if _served[0] == seed else 1
        number = _served[1] + (counts[info.id] if info.id < len(counts) else 0)
        # streams draw their order with the first, and take their parts of it
        seed_generators(first if number == 1 else derive_seed(seed, info.id, number))
    return None if samples is None else [None] * samples
