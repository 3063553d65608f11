"""`ShortRepr`: objects that show what they were made with."""

from __future__ import annotations

import inspect
import os
import reprlib
from typing import Any

__all__ = ["ShortRepr"]

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = 80
_SECRETS = ("token", "secret", "passw", "credential")


class ShortRepr:
    """Shown as `EarlyStopping(monitor='val_loss')`: with arguments that are kept as attributes, and are no defaults.

    Only plain values are shown, since others (a dataset, say) may have a long text, or none that says anything. What is
    a secret by its name is left out.
    """

    def __repr__(self) -> str:
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = _kept(self, name, parameter.default)
            if name.lower().endswith("key") or any(word in name.lower() for word in _SECRETS):
                continue
            if _is_plain(value) and (type(value), value) != (type(parameter.default), parameter.default):
                shown.append(f"{name}={_SHOWN.repr(os.fspath(value) if isinstance(value, os.PathLike) else value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _kept(owner: Any, name: str, default: Any) -> Any:
    """What is kept of an argument: an attribute of its name, else a property; the default where there is neither."""
    for attribute in (name, f"_{name}"):
        if attribute in vars(owner):
            return vars(owner)[attribute]
    try:
        return getattr(owner, name, default)
    except Exception:  # a user's property that is not ready yet
        return default


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str | os.PathLike)
