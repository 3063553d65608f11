"""NumPy's global generator, put aside for a moment: by its own functions that takes 0.1 ms, here 5 us.

Seen in NumPy 2.4 and 1.26.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["hold", "put_aside", "set_state"]

#: Bytes of a Mersenne Twister: 624 words and a position.
WORDS = 624
SIZE = 4 * WORDS + 4

_spare: Any = None  # generates meanwhile
_known: tuple[Any, bytes] | None = None  # a generator, and where it was when no second normal number was waiting


def put_aside() -> Callable[[], None] | None:
    """Have NumPy's global generator be another one, which is to be seeded; what is returned puts it back as it was.

    None where NumPy is not imported. Without `set_bit_generator` (NumPy 1.24), or with another kind of generator, its
    state is taken and set.
    """
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    random = numpy.random
    own = _twister(random)
    if own is None:
        state = random.get_state()
        return lambda: set_state(state)
    state = _with_normal(random, own)
    random.set_bit_generator(_spare)

    def put_back() -> None:
        random.set_bit_generator(own)  # which forgets a second normal number
        if state is not None:
            set_state(state)

    return put_back


def hold() -> Callable[[], None] | None:
    """Where NumPy's global generator is; what is returned puts it back there. None where NumPy is not imported."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    random = numpy.random
    own = _twister(random)
    state = random.get_state() if own is None else _with_normal(random, own)
    if state is None and _known is not None:
        words = numpy.frombuffer(_known[1], dtype=numpy.uint32)
        state = "MT19937", words[:WORDS], int(words[WORDS]), 0, 0.0
    return lambda: set_state(state)


def set_state(state: Any) -> None:
    """`numpy.random.set_state`, after which a second normal number may wait where none did."""
    global _known
    _known = None
    sys.modules["numpy"].random.set_state(state)


def _twister(random: Any) -> Any:
    """The global bit generator, if it may be swapped for another."""
    global _spare
    if not hasattr(random, "set_bit_generator"):
        return None
    own = random.get_bit_generator()
    if type(own) is not random.MT19937 or own is _spare:
        return None
    if _spare is None:
        spare = random.MT19937(0)
        state = spare.state["state"]
        if _bytes(spare) != state["key"].tobytes() + int(state["pos"]).to_bytes(4, sys.byteorder):
            return None
        _spare = spare
    return own


def _bytes(generator: Any) -> bytes:
    return ctypes.string_at(generator.ctypes.state_address, SIZE)


def _with_normal(random: Any, own: Any) -> Any:
    """The whole state where a second normal number waits: they are drawn in pairs, and it is not the generator's.

    As long as the generator does not move none can be waiting that was not before.
    """
    global _known
    now = _bytes(own)
    if _known is not None and _known[0] is own and _known[1] == now:
        return None
    state = random.get_state()
    _known = None if state[3] else (own, now)
    return state if state[3] else None
