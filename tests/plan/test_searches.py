from __future__ import annotations

import math
import random

import pytest

from raytrainer.errors import ConfigurationError
from raytrainer.plan.searches import SizeSearch, diverged_at, rates, smoothed, steepest


def test_rates():
    assert rates(1e-4, 1.0, 5, "exponential") == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert rates(1.0, 2.0, 3, "linear") == [1.0, 1.5, 2.0]


@pytest.mark.parametrize("wrong", [(0, 1, 9, "linear"), (2, 1, 9, "linear"), (1, 2, 2, "linear"), (1, 2, 9, "x")])
def test_wrong_rates(wrong):
    with pytest.raises(ConfigurationError, match="lr_find"):
        rates(*wrong)


def test_the_average_of_a_constant_is_that():
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smoothed([1.0, 2.0], beta=0.5) == pytest.approx([1.0, (0.25 * 1.0 + 0.5 * 2.0) / 0.75])


def test_divergence():
    assert diverged_at([1.0, 0.5, 1.9, 2.1, 0.1], 4.0) == 3
    assert diverged_at([1.0, 0.5, 99.0], None) is None
    assert diverged_at([1.0, math.nan], None) == 1
    assert diverged_at([-1.0, -2.0, 3.9], 4.0) is None and diverged_at([-1.0, -2.0, 4.1], 4.0) == 2
    assert diverged_at([], 4.0) is None
    assert diverged_at([0.1, 1.0, 1.2, 5.0], 4.0) == 1
    assert diverged_at([0.1, 1.0, 1.2, 5.0], 4.0, first=1) == 3
    assert diverged_at([0.1, math.inf], 4.0, first=5) == 1


def test_steepest():
    losses = [5.0] * 40 + [5.0 - 0.4 * step for step in range(10)] + [1.0] * 30 + [9.0] * 20
    assert 42 <= steepest(losses, 10, 1) <= 47
    assert steepest(losses, 90, 1) is None and steepest([], 10, 1) is None
    assert steepest([1.0, 2.0, 3.0, 4.0], 0, 0) is None


def test_noise_hardly_moves_the_steepest():
    noise = random.Random(5)
    true = [8.0 / (1.0 + math.exp((step - 60) / 4)) for step in range(80)]
    for _ in range(50):
        found = steepest([loss + noise.gauss(0.0, 2.0) for loss in true] + [20.0, 40.0, 80.0], 10, 1)
        assert abs(found - 60) <= 12


def sizes(search: SizeSearch, fits: int, data: int = 10**9) -> list[int]:
    tried = []
    while search.size is not None:
        tried.append(search.size)
        search.tell(search.size <= fits, enough=search.size >= data)
    return tried


@pytest.mark.parametrize(
    ("mode", "first", "fits", "tried", "best"),
    [
        ("power", 2, 37, [2, 4, 8, 16, 32, 64], 32),
        ("binsearch", 2, 37, [2, 4, 8, 16, 32, 64, 48, 40, 36, 38, 37], 37),
        ("power", 64, 20, [64, 32, 16], 16),
        ("binsearch", 64, 20, [64, 32, 16, 24, 20, 22, 21], 20),
        ("power", 2, 0, [2, 1], None),
    ],
)
def test_sizes(mode, first, fits, tried, best):
    search = SizeSearch(mode, first, 25)
    assert sizes(search, fits) == tried
    assert search.best == best


def test_a_search_ends():
    search = SizeSearch("power", 2, 3)
    assert sizes(search, 10**9) == [2, 4, 8] and search.best == 8
    search = SizeSearch("binsearch", 2, 25)
    assert sizes(search, 10**9, data=30) == [2, 4, 8, 16, 32] and search.best == 32


@pytest.mark.parametrize("wrong", [("x", 2, 3), ("power", 0, 3), ("power", 2, 0)])
def test_wrong_sizes(wrong):
    with pytest.raises(ConfigurationError, match="scale_batch_size"):
        SizeSearch(*wrong)
