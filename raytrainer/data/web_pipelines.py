"""WebDataset's pipelines: their shuffling steps know neither a run's seed nor its epoch, and are told here.

`shuffle` without a generator takes the clock for a seed, which is warned of; with one it goes on drawing from it, and
`detshuffle` counts its passes, from the first in each run and in each process of a loader.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader

from raytrainer.plan.seeds import derive_seed

__all__ = ["shuffling_steps", "tell_steps", "warn_of_the_clock"]

log = logging.getLogger("raytrainer")

_RNG, _SEED = 2, 3  # places of these among the arguments of `shuffle`, after the data


def shuffling_steps(source: Any, depth: int = 4) -> list[Any]:
    """Steps that shuffle, of a WebDataset or WebLoader, or of a DataLoader's dataset."""
    if isinstance(source, DataLoader):
        source = source.dataset
    if depth == 0 or not any(kind.__module__.startswith("webdataset.") for kind in type(source).__mro__):
        return []
    found = []
    for step in getattr(source, "pipeline", None) or ():
        shuffles = getattr(getattr(step, "f", None), "__name__", "") == "_shuffle" and hasattr(step, "kw")
        found += [step] if shuffles or type(step).__name__ == "detshuffle" else shuffling_steps(step, depth - 1)
    return found


def tell_steps(steps: Sequence[Any], epoch: int, seed: int) -> None:
    """Have steps draw from (seed, step), or count from `epoch`, in what is iterated next."""
    for number, step in enumerate(steps):
        rng = _argument(step, "rng", _RNG)
        if isinstance(rng, random.Random):
            rng.seed(derive_seed(seed, number))
        elif isinstance(getattr(step, "epoch", None), int):
            step.epoch = epoch - 1  # it adds one when it begins


def warn_of_the_clock(source: Any, stage: str) -> None:
    """Say that a run over `source` cannot be repeated, nor resumed, where that is so."""
    for step in shuffling_steps(source):
        if hasattr(step, "kw") and _argument(step, "rng", _RNG) is None and _argument(step, "seed", _SEED) is None:
            log.warning(
                "WebDataset's shuffle() draws its seed from the clock: each run over the %s loader is in another "
                "order, and one resumed in the middle of an epoch reads some samples twice and others never. Give it a "
                "generator, .shuffle(size, rng=random.Random(1)), which is seeded by (seed, epoch) here.", stage,
            )  # fmt: skip
            return


def _argument(step: Any, name: str, place: int) -> Any:
    args, named = getattr(step, "args", ()), getattr(step, "kw", {})
    return named.get(name, args[place] if len(args) > place else None)
