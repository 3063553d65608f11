"""Hyperparameters in checkpoints: values that come back with their type, or say that they do not.

In the file they are plain values. What has no plain form is a dict `{MARK: kind, "value": ...}`; classes in it go by
name (`references.py`). Nothing that a class defines is executed to restore an object of it.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import fractions
import functools
import io
import logging
import pathlib
import uuid
import weakref
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from raytrainer.checkpointing.references import NotAllowed, reference
from raytrainer.hparams import AttributeDict

__all__ = ["CONTAINERS", "MADE", "MARK", "pack", "pack_hyperparameters", "with_state"]

log = logging.getLogger("raytrainer")

MARK = "raytrainer type"

#: What torch reads and writes itself, without executing anything.
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Tensor, nn.Parameter)


class NoForm(Exception):
    """A value that cannot be written so that it comes back."""


def with_state(kind: Any, state: Mapping[str, Any]) -> Any:
    made = object.__new__(kind)
    for name, item in state.items():
        if name.startswith("__"):
            raise NotAllowed(f"it has an attribute {name}")
        object.__setattr__(made, name, item)
    return made


def _of_torch(name: str, kind: type) -> Any:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, kind):
        raise NotAllowed(f"torch has no {name}")
    return found


#: Types of which equal values are made from a plain one: name in the file, type, to it, from it.
MADE: list[tuple[str, type, Callable[[Any], Any], Callable[[Any], Any]]] = [
    ("datetime", datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    ("date", datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    ("time", datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    ("timedelta", datetime.timedelta, lambda t: (t.days, t.seconds, t.microseconds), lambda v: datetime.timedelta(*v)),
    ("decimal", decimal.Decimal, str, decimal.Decimal),
    ("fraction", fractions.Fraction, str, fractions.Fraction),
    ("uuid", uuid.UUID, str, uuid.UUID),
    ("range", range, lambda r: (r.start, r.stop, r.step), lambda v: range(*v)),
    ("torch.Size", torch.Size, tuple, torch.Size),
    ("layout", torch.layout, str, lambda v: _of_torch(v, torch.layout)),
    ("memory_format", torch.memory_format, str, lambda v: _of_torch(v, torch.memory_format)),
    *((kind.__name__, kind, str, kind) for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath)),
    # of the machine that reads it
    *(("Path", kind, str, pathlib.Path) for kind in (pathlib.PosixPath, pathlib.WindowsPath)),
]

#: Containers, by the name of their type in the file: type, to a packable value, from it.
CONTAINERS: list[tuple[str, type, Callable[[Any], Any], Callable[[Any], Any]]] = [
    ("OrderedDict", OrderedDict, dict, OrderedDict),
    ("Counter", Counter, dict, Counter),
    ("AttributeDict", AttributeDict, dict, AttributeDict),
    ("defaultdict", defaultdict, lambda d: (d.default_factory, dict(d)), lambda v: defaultdict(*v)),
    ("set", set, list, set),  # whose members need not be hashable in their plain form
    ("frozenset", frozenset, list, frozenset),
    ("slice", slice, lambda s: (s.start, s.stop, s.step), lambda v: slice(*v)),
    ("Namespace", Namespace, vars, lambda v: with_state(Namespace, v)),
    ("SimpleNamespace", SimpleNamespace, vars, lambda v: SimpleNamespace(**v)),
]


#: What has been warned of: by name and identity, as long as it lives.
_TOLD: dict[tuple[str, int], weakref.ref[Any]] = {}


# ---------------------------------------------------------------- into a file


def pack_hyperparameters(values: Mapping[str, Any], say: bool = True) -> dict[str, Any]:
    """All of them in plain values; of those that have no such form there is a note, so that loading can say so.

    Args:
        values: By name.
        say: Warn of these.
    """
    packed = {}
    for name, value in values.items():
        try:
            packed[name] = pack(value)
        except (NoForm, RecursionError) as error:
            kind = str(error) if isinstance(error, NoForm) else type(value).__name__
            if say and _is_news(name, value):
                log.warning(
                    "Hyperparameter %r holds a %s and is left out of checkpoints; pass it to "
                    "load_from_checkpoint(...), or ignore it in save_hyperparameters(ignore=[...]).", name, kind,
                )  # fmt: skip
            packed[name] = {MARK: "left out", "value": kind}
    return packed


def _is_news(name: str, value: Any) -> bool:
    """Whether this is the first save of this very object under that name; a run's later ones would say the same."""
    key = name, id(value)
    told = _TOLD.get(key)
    with suppress(TypeError):  # lists and the like: said each time
        _TOLD[key] = weakref.ref(value, lambda _: _TOLD.pop(key, None))
    return told is None or told() is not value


def pack(value: Any) -> Any:
    """The value in plain ones."""
    kind = type(value)
    if kind in PLAIN:
        return value.detach() if kind is Tensor and not value.is_leaf else value
    if kind in (list, tuple):
        return kind(pack(item) for item in value)
    if kind is set and all(type(item) in PLAIN for item in value):
        return value
    if kind is dict:
        if all(type(key) in (str, int, bool) for key in value) and MARK not in value:
            return {key: pack(item) for key, item in value.items()}
        return {MARK: "dict", "value": [(pack(key), pack(item)) for key, item in value.items()]}
    for name, made, to, back in MADE:
        if kind is made:
            plain = to(value)
            if repr(back(plain)) != repr(value):  # a time with a zone of its own, say
                raise NoForm(f"{kind.__name__} ({value!r})")
            return {MARK: name, "value": plain}
    for name, container, to, _ in CONTAINERS:
        if kind is container:
            return {MARK: name, "value": pack(to(value))}
    return _pack_by_class(value)


def _pack_by_class(value: Any) -> Any:
    kind = type(value)
    if isinstance(value, Enum):
        by_name = kind.__members__.get(value.name or "") is value
        return {MARK: "enum", "class": _named(kind), "value": value.name if by_name else pack(value.value)}
    if kind.__module__ in ("numpy", "numpy.dtypes") and (array := _pack_numpy(value)) is not None:
        return array
    if kind is functools.partial:
        return {MARK: "partial", "value": pack((value.func, value.args, value.keywords))}
    if kind.__module__.startswith("omegaconf."):
        return {MARK: "omegaconf", "value": pack(_from_omegaconf(value))}
    if isinstance(value, nn.Module):
        raise NoForm(f"module ({kind.__name__}; its weights are in the checkpoint)")
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return {MARK: "namedtuple", "class": _named(kind), "value": [pack(item) for item in value]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {MARK: "dataclass", "class": _named(kind), "value": pack(_state(value))}
    if callable(value) and (name := reference(value)) is not None:
        return {MARK: "reference", "value": name}
    raise NoForm(getattr(value, "__qualname__", kind.__name__) if callable(value) else kind.__name__)


def _named(kind: type) -> tuple[str, str]:
    name = reference(kind)
    if name is None:
        raise NoForm(f"{kind.__qualname__}, which no module has by that name")
    return name


def _state(value: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    return {name: getattr(value, name) for name in names} | dict(getattr(value, "__dict__", {}))


def _pack_numpy(value: Any) -> dict[str, Any] | None:
    import numpy

    scalar, dtype = isinstance(value, numpy.generic), isinstance(value, numpy.dtype)
    if not scalar and not dtype and type(value) is not numpy.ndarray:
        return None
    stream = io.BytesIO()
    try:
        numpy.save(stream, numpy.empty(0, value) if dtype else numpy.asarray(value), allow_pickle=False)
    except ValueError:
        raise NoForm(f"{type(value).__name__} of objects") from None
    return {MARK: "numpy", "is": "dtype" if dtype else "scalar" if scalar else "array", "value": stream.getvalue()}


def _from_omegaconf(value: Any) -> Any:
    """Its values as they are now: what interpolations would call is not for a file to choose."""
    from omegaconf import OmegaConf

    try:
        plain = OmegaConf.to_container(value, resolve=True)
    except Exception as error:
        raise NoForm(f"{type(value).__name__} ({error})") from None
    kind = OmegaConf.get_type(value)
    structured = kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None
    return plain, structured, {"struct": OmegaConf.is_struct(value), "readonly": OmegaConf.is_readonly(value)}
