"""NumPy's global generator, put aside and back: draws are those that they would have been."""

from __future__ import annotations

import numpy
import pytest

from raytrainer.private import numpy_private
from raytrainer.seeding import capture_rng, host_generators, restore_rng


@pytest.fixture(autouse=True)
def as_it_was():
    before = capture_rng()
    yield
    restore_rng(before)


def drawn(how: list[str]) -> list[float]:
    """What is drawn, with a batch read after each draw."""
    numpy.random.seed(3)
    found = []
    for kind in how:
        found.append(float(getattr(numpy.random, kind)()))
        with host_generators(5):
            inside = numpy.random.rand(), numpy.random.randn(), numpy.random.randint(9)
        found.append(inside[0])
    return found


@pytest.mark.parametrize("without", ["nothing", "set_bit_generator", "the place of its state"])
@pytest.mark.parametrize("how", [["rand"] * 3, ["randn"] * 5, ["randn", "rand", "randn", "randn"]], ids="-".join)
def test_the_same_draws(how, without, monkeypatch):
    numpy.random.seed(3)
    outside = [float(getattr(numpy.random, kind)()) for kind in how]
    with host_generators(5):
        inside = numpy.random.rand()
    monkeypatch.setattr(numpy_private, "_spare", None)
    if without == "set_bit_generator":
        monkeypatch.delattr(numpy.random, "set_bit_generator")
    elif without != "nothing":
        monkeypatch.setattr(numpy_private, "_bytes", lambda generator: b"")
    found = drawn(how)
    assert found[::2] == outside
    assert set(found[1::2]) == {inside}


def test_a_second_normal_number_that_is_put_back():
    """It waits where the generator is, as it did not when it was there before."""
    numpy.random.seed(3)
    numpy.random.randn()
    waiting = capture_rng()
    second = numpy.random.randn()
    with host_generators(5):
        pass
    restore_rng(waiting)
    with host_generators(5):
        pass
    assert numpy.random.randn() == second


def test_other_generators():
    own = numpy.random.get_bit_generator()
    try:
        numpy.random.set_bit_generator(numpy.random.PCG64(4))
        before = numpy.random.rand()
        assert numpy_private._twister(numpy.random) is None
        assert before != numpy.random.rand()
    finally:
        numpy.random.set_bit_generator(own)
