"""Class methods that make something, and are not to be called on an object, which would stay as it is."""

from __future__ import annotations

import functools
from typing import Any

from raytrainer.errors import ConfigurationError

__all__ = ["only_on_the_class"]


def only_on_the_class(kind: type, name: str) -> None:
    """Have objects refuse this class method: who calls it on one may think that it changes that one."""
    setattr(kind, name, _OfTheClass(vars(kind)[name].__func__))


class _OfTheClass(classmethod):  # type: ignore[type-arg]
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return super().__get__(instance, owner)
        kind, name = type(instance).__name__, self.__func__.__name__

        @functools.wraps(self.__func__)
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise ConfigurationError(
                f"{name} makes a new object, and leaves this one as it is: write new = {kind}.{name}(...)."
            )

        return refuse
