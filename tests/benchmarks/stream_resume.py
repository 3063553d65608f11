"""Milliseconds to a stream's first batch: from its beginning, resumed from its state, and by reading up to it again.

For a user's dataset in process and in two loader processes, and for torchdata's StatefulDataLoader (if installed). The
state is that after batch 200,000 by default; "reading again" is measured over fewer batches and scaled.

Run: python tests/benchmarks/stream_resume.py [--batches 200000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved, table
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from raytrainer.data.feed import Feed
from raytrainer.data.look_ahead import LookAhead
from raytrainer.data.sharding import Share
from raytrainer.plan.settings import build_settings

SIZE = 16
READ = 2000  # batches, from which the time of reading all of them again is scaled


class Stream(IterableDataset[Any]):
    """Rows without end, each of them parsed from text."""

    def __init__(self) -> None:
        self.start = self.at = 0

    def __iter__(self) -> Any:
        info = get_worker_info()
        worker, step = (0, 1) if info is None else (info.id, info.num_workers)
        at, self.start = self.start or worker, 0
        while True:
            self.at = at + step
            yield torch.tensor([float(text) for text in f"{at} 1 2 3 4 5 6 7".split()])
            at += step

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["at"]


class Forgetful(Stream):
    """The same without a state."""

    load_state_dict = None  # type: ignore[assignment]


def feed(make: Callable[[], Any]) -> Feed:
    return Feed(make(), "train", Share(0, 1), 1, build_settings())


def state_at(make: Callable[[], Any], batches: int) -> dict[str, Any]:
    """A state as a checkpoint has it: taken after a few batches, of a dataset that begins far on."""
    source = feed(make)
    iterator = source.start(0)
    assert isinstance(iterator, LookAhead)
    iterator.keeping = True
    for _ in range(4):
        next(iterator)
    state = source.state()
    source.close()
    assert state is not None and state["stream"] is not None
    return moved(state, batches - 4) | {"batch": batches}


def moved(state: Any, batches: int) -> Any:
    """The same state so many batches later."""
    if isinstance(state, dict):
        later = {"at": SIZE * batches, "_num_yielded": batches, "_sampler_iter_yielded": batches}
        return {k: v + later[k] if k in later and v is not None else moved(v, batches) for k, v in state.items()}
    return [moved(item, batches) for item in state] if isinstance(state, list) else state


def first_batch(make: Callable[[], Any], state: dict[str, Any] | None, batches: int) -> float:
    """Seconds from the loader to its first batch."""
    begun = time.perf_counter()
    source = feed(make)
    source.take_state(state)
    source.begin(0)
    batch = next(source.start(0, batches))
    seconds = time.perf_counter() - begun
    if state is not None:
        assert int(batch[0, 0]) >= SIZE * (batches - 8), (batch[0], batches)
    source.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    loaders: dict[str, Callable[[type], Any]] = {
        "in process": lambda kind: DataLoader(kind(), SIZE),
        "2 processes": lambda kind: DataLoader(kind(), SIZE, num_workers=2),
    }
    if importlib.util.find_spec("torchdata"):
        from torchdata.stateful_dataloader import StatefulDataLoader

        loaders["torchdata"] = lambda kind: StatefulDataLoader(kind(), SIZE)
        loaders["torchdata, 2 processes"] = lambda kind: StatefulDataLoader(kind(), SIZE, num_workers=2)
    for name, loader in loaders.items():

        def own(loader: Any = loader) -> Any:
            return loader(Stream)

        def forgetful(loader: Any = loader) -> Any:
            return loader(Forgetful)

        state = state_at(own, options.batches)
        sides = {
            "fresh": lambda own=own: first_batch(own, None, 0),
            "resumed": lambda own=own, state=state: first_batch(own, state, options.batches),
        }
        if "torchdata" not in name:
            scale = options.batches / READ
            sides["reading again"] = lambda forgetful=forgetful, scale=scale: first_batch(forgetful, None, READ) * scale
        print(f"\n{name}, batch {options.batches:,}\n")
        print(table(interleaved(sides, options.rounds), "fresh", "ms", 1000))


if __name__ == "__main__":
    main()
