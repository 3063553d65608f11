"""Objects of Lightning's that are given where this package has classes of its own."""

from __future__ import annotations

__all__ = ["is_lightnings"]


def is_lightnings(given: object, kind: str) -> bool:
    """Whether it derives from Lightning's class of that name, without importing Lightning."""
    return any(
        base.__name__ == kind and "lightning" in base.__module__.partition(".")[0] for base in type(given).__mro__
    )
