"""Objects from plain values: `{"class_path": "package.Class", "init_args": {...}}`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from raytrainer.errors import ConfigurationError, RaytrainerError, UnknownArgumentError
from raytrainer.plan.argument_names import unknown_argument

__all__ = ["check_names", "find", "instantiate", "named"]


def instantiate(value: Any) -> Any:
    """`value` with every mapping that has a "class_path" replaced by the object it describes, also in lists and dicts.

    A path without a dot names something of raytrainer's.

    Raises:
        ConfigurationError: There is no such class, or it does not take these arguments.
    """
    if isinstance(value, (list, tuple)):
        return [instantiate(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        return {key: instantiate(item) for key, item in value.items()}
    path, extra = value["class_path"], sorted(set(value) - {"class_path", "init_args"})
    if extra:
        raise ConfigurationError(f"{path!r}: {extra} beside class_path; arguments go into init_args.")
    cls = find(path)
    given = value.get("init_args") or {}
    arguments = named(given, f"{path}: init_args")
    check_names(cls, arguments)
    try:
        return cls(**arguments)
    except RaytrainerError:
        raise
    except Exception as error:  # a string where a number is expected, say
        raise ConfigurationError(f"{path}: {type(error).__name__}: {error}; init_args are {given}.") from error


def named(values: Any, what: str) -> dict[str, Any]:
    """The objects that a mapping of names describes.

    Raises:
        ConfigurationError: It is no such mapping.
    """
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ConfigurationError(f"{what}={values!r}: give names and their values.")
    return {name: instantiate(value) for name, value in values.items()}


def find(path: Any) -> Any:
    if not isinstance(path, str) or not path:
        raise ConfigurationError(f'class_path={path!r}: give "package.module.Class".')
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "raytrainer"), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"class_path={path!r}: {error}. Give an importable package.module.Class.") from error
    if not callable(found):
        raise ConfigurationError(f"class_path={path!r} is a {type(found).__name__}; give a class.")
    return found


def check_names(cls: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that `cls` does not take.

    Raises:
        UnknownArgumentError: Says which, and what was probably meant.
    """
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in arguments:
        if name not in parameters:
            raise UnknownArgumentError(unknown_argument(cls.__name__, name, parameters))
