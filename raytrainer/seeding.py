"""Random number generators of one process: seed them, capture them, put them back."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raytrainer.errors import ConfigurationError
from raytrainer.plan.given_arguments import answers
from raytrainer.plan.seeds import derive_seed
from raytrainer.private import numpy_private

__all__ = [
    "capture_rng",
    "hold_rng",
    "host_generators",
    "last_seed",
    "restore_rng",
    "rng_untouched",
    "same_rng",
    "seed_everything",
    "seed_generators",
    "seed_host",
]

log = logging.getLogger("raytrainer")

_last_seed: int | None = None


@answers
def seed_everything(seed: int | None = None, workers: bool = True, verbose: bool = True) -> int:
    """Seed Python's, NumPy's and torch's generators of this process, and the runs of Trainers made afterwards.

    Args:
        seed: From 0 to 2**63 - 1; None: a random one.
        workers: Accepted for compatibility: loader processes always get streams of their own.
        verbose: Whether to log the seed.

    Returns:
        The seed.
    """
    global _last_seed
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigurationError(f"seed_everything({seed!r}): give an integer from 0 to 2**63 - 1, or None.")
    if verbose:
        log.info("Seed set to %d", seed)
    seed_generators(seed)
    _last_seed = seed
    return seed


def last_seed() -> int | None:
    """The seed of the latest `seed_everything`, or None."""
    return _last_seed


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's (if it is imported) and torch's global generators, on all devices."""
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(derive_seed(seed, "numpy") % 2**32)


def seed_host(seed: int) -> None:
    """Seed the generators of Python, NumPy (if it is imported) and torch's CPU, leaving devices alone."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(derive_seed(seed, "numpy") % 2**32)


def capture_rng() -> dict[str, Any]:
    """The state of this process's generators, as plain values and tensors."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = [kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put the generators back into a state that `capture_rng` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        import numpy

        kind, keys, position, has_gauss, cached = state["numpy"]
        numpy_private.set_state((kind, keys.cpu().numpy().astype(numpy.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def same_rng(one: Any, other: Any) -> bool:
    """Whether two states of `capture_rng` are the same."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_rng(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same_rng(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def hold_rng() -> Callable[[], None]:
    """Remember where this process's generators are; what is returned puts them back there.

    A tenth of what `capture_rng` costs, whose values can be stored.
    """
    own, of_torch, put_numpy_back = random.getstate(), torch.get_rng_state(), numpy_private.hold()
    of_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def put_back() -> None:
        random.setstate(own)
        torch.set_rng_state(of_torch)
        if put_numpy_back is not None:
            put_numpy_back()
        if of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu)

    return put_back


@contextmanager
def rng_untouched() -> Iterator[None]:
    """Whatever happens inside leaves no trace in the generators."""
    put_back = hold_rng()
    try:
        yield
    finally:
        put_back()


@contextmanager
def host_generators(seed: int) -> Iterator[None]:
    """Inside, the generators of Python, NumPy and torch's CPU are those of `seed`; afterwards as they were.

    For once a batch: a tenth of what `rng_untouched` and `seed_generators` cost, which care for devices too.
    """
    own, of_torch, put_numpy_back = random.getstate(), torch.get_rng_state(), numpy_private.put_aside()
    try:
        seed_host(seed)
        yield
    finally:
        random.setstate(own)
        torch.set_rng_state(of_torch)
        if put_numpy_back is not None:
            put_numpy_back()
