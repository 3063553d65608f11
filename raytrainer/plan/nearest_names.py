"""Which name was probably meant: the one place where messages look for it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest", "nearly", "perhaps"]

#: Names that have more words than were given are offered if there are no more than so many of them.
_OFFERED = 4


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The names that were probably meant by one that there is not: usually one, none where nothing is like it.

    They are the same but for capitals, underscores and plurals; or spelt nearly so; or have all its words and others
    too ("every_n_steps": "every_n_train_steps"); or all their words are in it ("tensor_parallel": "tensor").

    Args:
        name: What was given.
        known: What there is.
        cutoff: How alike two words' letters must be, from 0 to 1.
    """
    names = list(known)
    words = _words(name)
    same = [other for other in names if _words(other) == words or _squeezed(other) == _squeezed(name)]
    if same:
        return same[:1]
    by_small = {other.lower(): other for other in names}

    def alike(least: float) -> list[str]:
        return [by_small[found] for found in difflib.get_close_matches(name.lower(), by_small, n=1, cutoff=least)]

    if found := alike(max(cutoff, 0.9)):
        return found
    if len(_squeezed(name)) >= 3:
        longer = [other for other in names if words < _words(other)]
        if 0 < len(longer) <= _OFFERED:
            return longer
    if found := alike(max(cutoff, 0.8)):
        return found
    shorter = [other for other in names if _words(other) < words]
    return sorted(shorter, key=lambda other: -len(_words(other)))[:1] or alike(cutoff)


def nearly(name: str, known: Iterable[str], cutoff: float = 0.88) -> str:
    """The name that is a letter or so away, or "": what others may have meant as a name of their own is none.

    Args:
        name: What was given.
        known: What there is.
        cutoff: How alike the letters must be, from 0 to 1.
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), "")


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """ "did you mean 'max_epochs'?", or "" where nothing is like it."""
    found = [repr(other) for other in nearest(name, known, cutoff)]
    if not found:
        return ""
    return f"did you mean {' or '.join(filter(None, [', '.join(found[:-1]), found[-1]]))}?"


def perhaps(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The same as a sentence to follow others: " Did you mean 'max_epochs'?", or ""."""
    meant = did_you_mean(name, known, cutoff) if isinstance(name, str) else ""
    return meant and f" {meant[0].upper()}{meant[1:]}"


def _words(name: str) -> frozenset[str]:
    return frozenset(word.removesuffix("s") or word for word in re.split(r"[^a-z0-9]+", name.lower()) if word)


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())
