"""Generators (torch's, NumPy's, Python's) that a user's objects hold: seeded, or their states taken and put back."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from raytrainer.checkpointing.restored_values import unpack_hyperparameters
from raytrainer.checkpointing.typed_values import pack
from raytrainer.data.held_objects import STREAMS, held, library_of
from raytrainer.plan.seeds import derive_seed

__all__ = [
    "FOREIGN",
    "hold_generators",
    "holds_objects",
    "is_generator",
    "put_back",
    "reseed",
    "seed_those_of",
    "states_of",
]

#: Libraries whose objects hold nothing of a user's that draws.
FOREIGN = {
    "numpy",
    "threading",
    "multiprocessing",
    "queue",
    "logging",
    "pathlib",
    "torch",
    "pandas",
    "pyarrow",
}

_WITHOUT = (*FOREIGN, *STREAMS, "builtins", "raytrainer")


def is_generator(part: Any) -> bool:
    return isinstance(part, (torch.Generator, random.Random)) or type(part).__module__.startswith("numpy.random")


def reseed(generator: Any, seed: int) -> None:
    """Have a generator draw as a new one does that is given this seed."""
    numpy = sys.modules.get("numpy")
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif numpy is None:
        return
    elif isinstance(generator, numpy.random.RandomState):
        generator.seed(seed % 2**32)
    elif isinstance(generator, numpy.random.SeedSequence):
        type(generator).__init__(generator, seed)  # it counts its children, and nothing else resets that
    elif isinstance(generator, (numpy.random.Generator, numpy.random.BitGenerator)):
        bits = getattr(generator, "bit_generator", generator)
        bits.state = type(bits)(seed).state
        reseed(getattr(bits, "seed_seq", None), seed)  # which `spawn` asks


# ---------------------------------------------------------------- of datasets, and of what collates


def seed_those_of(root: Any, seed: int) -> None:
    """Seed each generator that a dataset, or a `collate_fn`, or something in it has."""
    for path, part in held(root, _may_draw):
        if is_generator(part):
            reseed(part, derive_seed(seed, "generator", path))


def states_of(roots: Sequence[Any]) -> list[dict[str, Any]]:
    """Where the generators are that each of these has, by the way to them, as a checkpoint can have it."""
    return [
        {path: form for path, part in held(root, _may_draw) if is_generator(part) and (form := _form(part)) is not None}
        for root in roots
    ]


def put_back(roots: Sequence[Any], states: Sequence[dict[str, Any]]) -> None:
    """The reverse of `states_of`, also where a generator is only made when it is first asked for."""
    for root, forms in zip(roots, states, strict=False):
        parts = dict(held(root, _may_draw))
        for path, form in forms.items():
            owner, _, name = path.rpartition(".")
            state = unpack_hyperparameters({"state": form["state"]})["state"]
            if path not in parts and owner in parts and getattr(parts[owner], name, form) is None:
                parts[path] = _made(form["kind"], state)
                setattr(parts[owner], name, parts[path])
            if path in parts and _kind(parts[path]) == form["kind"]:
                _set(parts[path], state)


def hold_generators(loaders: Iterable[Any]) -> Callable[[], None]:
    """Note where generators are that loaders, their datasets and `collate_fn` have; what is returned puts them back.

    Args:
        loaders: The user's; a `CombinedLoader` stands for those in it.
    """
    roots = [part for loader in loaders for part in getattr(loader, "flattened", [loader])]
    return functools.partial(put_back, roots, states_of(roots))


def holds_objects(function: Any) -> bool:
    """Whether it is more than code: a method, a partial function, or an object that can be called."""
    return _may_draw(function)


def _may_draw(value: Any) -> bool:
    if is_generator(value) or isinstance(value, (functools.partial, MethodType)):
        return True
    if isinstance(value, (type, torch.Tensor, DataLoader)):
        return False
    return library_of(value) not in _WITHOUT or (isinstance(value, Dataset) and library_of(value) == "torch")


def _kind(generator: Any) -> str:
    return f"{library_of(generator)}.{type(generator).__name__}"


def _form(generator: Any) -> dict[str, Any] | None:
    """Its kind and state; None of one without a state that is its own."""
    state: Any = None
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
    elif type(generator) is random.Random:
        state = generator.getstate()
    elif _kind(generator) == "numpy.RandomState":
        state = generator.get_state(legacy=False)
    elif _kind(generator) == "numpy.Generator":
        state = generator.bit_generator.state
    elif _kind(generator) == "numpy.SeedSequence":
        state = generator.state
    return None if state is None else {"kind": _kind(generator), "state": pack(state)}


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif _kind(generator) == "numpy.RandomState":
        generator.set_state(state)
    elif _kind(generator) == "numpy.SeedSequence":
        type(generator).__init__(generator, **state)
    elif generator.bit_generator.state["bit_generator"] == state["bit_generator"]:
        generator.bit_generator.state = state


def _made(kind: str, state: Any) -> Any:
    if kind == "torch.Generator":
        return torch.Generator()
    if kind == "random.Random":
        return random.Random()
    import numpy

    if kind == "numpy.SeedSequence":
        return numpy.random.SeedSequence()
    bits = getattr(numpy.random, state["bit_generator"])()
    return numpy.random.RandomState(bits) if kind == "numpy.RandomState" else numpy.random.Generator(bits)
