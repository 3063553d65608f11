"""Several reads at a time."""

from __future__ import annotations

import threading

import pytest

from raytrainer.checkpointing.parallel_reads import READERS, read_all


def test_in_their_order_and_several_at_a_time():
    together = threading.Barrier(READERS, timeout=60)  # broken, an error, if they come one after the other

    def read(name):
        together.wait()
        return name.upper()

    names = [f"part{number}" for number in range(2 * READERS)]
    found = read_all({name: lambda name=name: read(name) for name in names})
    assert list(found.items()) == [(name, name.upper()) for name in names]
    assert read_all({}) == {}


def test_the_first_error_in_their_order_is_told():
    later = threading.Event()

    def first():
        assert later.wait(60)
        raise ValueError("first")

    def second():
        later.set()
        raise KeyError("second")

    with pytest.raises(ValueError, match="first"):
        read_all({"a": first, "b": second, "c": str})
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("raytrainer-read")]
