"""What many ranks say, in few words: ranks as spans, and what several say alike once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

__all__ = ["by_text", "few", "ranks_text"]

T = TypeVar("T")


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks in ascending order, neighbours as spans.

    Example:
        0, 3, 4, 5 and 9 are "0, 3-5, 9"; two neighbours are named both: "3, 4".
    """
    spans: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = [f"{a}" if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in spans]
    return few(shown, 20)


def few(items: Sequence[str], most: int) -> str:
    """The first of these, and how many more there are."""
    more = len(items) - most
    return ", ".join(items) if more <= 0 else f"{', '.join(items[:most])} and {more} more"


def by_text(said: Mapping[int, T]) -> list[tuple[list[int], T]]:
    """Ranks that say the same, with that, in the order of the first of them."""
    groups: dict[T, list[int]] = {}
    for rank in sorted(said):
        groups.setdefault(said[rank], []).append(rank)
    return [(ranks, text) for text, ranks in groups.items()]
