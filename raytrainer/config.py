"""Objects from plain values: `{"class_path": "package.Class", "init_args": {...}}`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from raytrainer.errors import ConfigurationError, UnknownArgumentError
from raytrainer.plan.argument_names import unknown_argument

__all__ = ["check_names", "instantiate"]


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
    cls = _find(path)
    arguments = instantiate(dict(value.get("init_args") or {}))
    check_names(cls, arguments)
    return cls(**arguments)


def _find(path: Any) -> Any:
    if not isinstance(path, str) or not path:
        raise ConfigurationError(f'class_path={path!r}: give "package.module.Class".')
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "raytrainer"), name)
    except (ImportError, AttributeError) as error:
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
