"""Hyperparameters out of checkpoints: the reverse of `typed_values.py`, for files that need not be trusted."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from enum import EnumMeta, Flag
from typing import Any

from raytrainer.checkpointing.references import NotAllowed, resolve
from raytrainer.checkpointing.typed_values import CONTAINERS, MADE, MARK, with_state
from raytrainer.init_calls import NotRestored

__all__ = ["unpack_hyperparameters"]


def unpack_hyperparameters(packed: Mapping[str, Any], owners: Sequence[type] = ()) -> dict[str, Any]:
    """The reverse of `pack_hyperparameters`; a `NotRestored` stands for what cannot be restored.

    Args:
        packed: From a file, which need not be trusted.
        owners: The classes that are being loaded, whose package is the user's own.
    """
    values: dict[str, Any] = {}
    for name, value in packed.items():
        try:
            values[name] = _unpack(value, owners)
        except NotAllowed as error:
            values[name] = NotRestored(str(error))
        except Exception as error:  # whatever a damaged or malicious file makes of it
            values[name] = NotRestored(f"it cannot be read here ({type(error).__name__}: {error})")
    return values


def _unpack(value: Any, owners: Sequence[type]) -> Any:
    if type(value) in (list, tuple, set):
        return type(value)(_unpack(item, owners) for item in value)
    if type(value) is not dict:
        return value
    if MARK not in value:
        return {key: _unpack(item, owners) for key, item in value.items()}
    kind, held = value[MARK], value["value"]
    for name, _, _, back in MADE:
        if kind == name:
            return back(held)
    for name, _, _, back in CONTAINERS:
        if kind == name:
            return back(_unpack(held, owners))
    return UNPACK[kind](held, value, owners) if kind in UNPACK else _unknown(kind)


def _unknown(kind: Any) -> Any:
    raise NotAllowed(f"it is a {kind!r}, which this raytrainer does not know; a newer one has written it")


def _found(named: tuple[str, str], owners: Sequence[type]) -> Any:
    module, name = named
    return resolve(module, name, owners)


def _left_out(held: Any, value: dict[str, Any], owners: Sequence[type]) -> Any:
    raise NotAllowed(f"it holds a {held}, which cannot be stored")


def _unpack_dict(held: Any, value: dict[str, Any], owners: Sequence[type]) -> Any:
    return {_unpack(key, owners): _unpack(item, owners) for key, item in held}


def _unpack_enum(held: Any, value: dict[str, Any], owners: Sequence[type]) -> Any:
    kind = _found(value["class"], owners)
    if not isinstance(kind, EnumMeta):
        raise NotAllowed(f"{value['class']} is no enum any more")
    if held in kind.__members__:
        return kind.__members__[held]
    if issubclass(kind, Flag) and isinstance(held, int):
        return kind(held)  # members together
    raise NotAllowed(f"{kind.__name__} has no member {held!r} any more")


def _unpack_array(held: Any, value: dict[str, Any], owners: Sequence[type]) -> Any:
    import numpy

    array = numpy.load(io.BytesIO(held), allow_pickle=False)
    return array.dtype if value["is"] == "dtype" else array[()] if value["is"] == "scalar" else array


def _unpack_partial(held: Any, value: dict[str, Any], owners: Sequence[type]) -> Any:
    function, arguments, keywords = _unpack(held, owners)
    return functools.partial(function, *arguments, **keywords)


def _unpack_omegaconf(held: Any, value: dict[str, Any], owners: Sequence[type]) -> Any:
    from omegaconf import OmegaConf

    plain, structured, flags = _unpack(held, owners)
    if _interpolates(plain):
        raise NotAllowed("it has interpolations, and a file may not choose what they call")
    config = OmegaConf.create(plain)
    if structured is not None:
        config = OmegaConf.merge(OmegaConf.structured(structured), config)
    OmegaConf.set_struct(config, flags["struct"] if structured is None else None)
    OmegaConf.set_readonly(config, flags["readonly"] or None)
    return config


def _interpolates(plain: Any) -> bool:
    if isinstance(plain, dict):
        return any(_interpolates(item) for pair in plain.items() for item in pair)
    return any(map(_interpolates, plain)) if isinstance(plain, list) else isinstance(plain, str) and "${" in plain


def _unpack_namedtuple(held: Any, value: dict[str, Any], owners: Sequence[type]) -> Any:
    kind, items = _found(value["class"], owners), _unpack(held, owners)
    if len(items) != len(kind._fields):
        raise NotAllowed(f"{kind.__name__} has other fields now: {', '.join(kind._fields)}")
    return tuple.__new__(kind, items)


def _unpack_dataclass(held: Any, value: dict[str, Any], owners: Sequence[type]) -> Any:
    kind, state = _found(value["class"], owners), _unpack(held, owners)
    if not dataclasses.is_dataclass(kind):
        raise NotAllowed(f"{value['class'][1]} is no dataclass any more")
    missing = [field.name for field in dataclasses.fields(kind) if field.name not in state]
    if missing:
        raise NotAllowed(f"{value['class'][1]} has fields now that the checkpoint lacks: {missing}")
    return with_state(kind, state)


UNPACK: dict[str, Callable[[Any, dict[str, Any], Sequence[type]], Any]] = {
    "left out": _left_out,
    "dict": _unpack_dict,
    "enum": _unpack_enum,
    "numpy": _unpack_array,
    "partial": _unpack_partial,
    "omegaconf": _unpack_omegaconf,
    "namedtuple": _unpack_namedtuple,
    "dataclass": _unpack_dataclass,
    "reference": lambda held, value, owners: _found(held, owners),
}
