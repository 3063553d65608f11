from __future__ import annotations

from datetime import timedelta

import pytest

from raytrainer.errors import ConfigurationError
from raytrainer.plan import argument_checks as checks


@pytest.mark.parametrize(
    ("value", "normal"),
    [
        (32, "32-true"),
        ("32", "32-true"),
        (64, "64-true"),
        (16, "16-mixed"),
        ("16-mixed", "16-mixed"),
        ("bf16", "bf16-mixed"),
        ("BF16-mixed", "bf16-mixed"),
        ("16-true", "16-true"),
        ("bf16-true", "bf16-true"),
    ],
)
def test_precision(value, normal):
    assert checks.precision("precision", value) == normal


@pytest.mark.parametrize("value", [8, "fp16", True, None, 16.0])
def test_precision_refused(value):
    with pytest.raises(ConfigurationError, match=r"precision=.*bf16-true"):
        checks.precision("precision", value)


@pytest.mark.parametrize(
    ("value", "normal"),
    [
        (None, 0),
        (0, 0),
        (2, 2),
        (-1, -1),
        ("2", 2),
        ("-1", -1),
        ("1,3", (1, 3)),
        ("3,", (3,)),
        ([2, 0], (0, 2)),
        ((1,), (1,)),
        ([], 0),
    ],
)
def test_gpus(value, normal):
    assert checks.gpus(value) == normal


@pytest.mark.parametrize("value", [True, 1.0, [0, 0], "0,0", [-1, 0], ["0"], "x", "1;2", -2, {0: 1}, ""])
def test_gpus_refused(value):
    if value == "":
        assert checks.gpus(value) == 0
        return
    with pytest.raises(ConfigurationError, match=r"gpus="):
        checks.gpus(value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("00:00:00:30", 30.0),
        ("01:00:00:00", 86400.0),
        (timedelta(minutes=2), 120.0),
        ({"hours": 1, "seconds": 1}, 3601.0),
        ({}, 0.0),
    ],
)
def test_duration(value, seconds):
    assert checks.duration("max_time", value) == seconds


@pytest.mark.parametrize("value", ["30", "a:b:c:d", "00:00:-1:00", 30, {"eons": 1}, timedelta(seconds=-1)])
def test_duration_refused(value):
    with pytest.raises(ConfigurationError, match="max_time="):
        checks.duration("max_time", value)


@pytest.mark.parametrize(
    ("value", "allowed"), [(0, True), (5, True), (-1, False), (True, False), (1.0, False), (None, False)]
)
def test_count(value, allowed):
    if allowed:
        assert checks.count("n", value, least=0) == value
    else:
        with pytest.raises(ConfigurationError, match=r"n=.*: give an integer of at least 0\."):
            checks.count("n", value, least=0)


def test_count_alternatives():
    assert checks.count("n", None, least=1, none=True) is None
    assert checks.count("n", -1, least=1, minus_one="all") == -1
    with pytest.raises(ConfigurationError, match="at least 1, or -1 for all, or None"):
        checks.count("n", 0, least=1, none=True, minus_one="all")


def test_choice_tells_true_from_one():
    assert checks.choice("x", True, (False, True)) is True
    with pytest.raises(ConfigurationError, match=r"x=1: give one of False, True\. Or else\."):
        checks.choice("x", 1, (False, True), hint="Or else.")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0, -1, "1", True])
def test_number_refused(value):
    with pytest.raises(ConfigurationError, match="greater than 0, or None"):
        checks.number("x", value, above=0.0)


@pytest.mark.parametrize(
    ("value", "least", "result"),
    [(0, 0, 0), (0.0, 0, 0.0), (1, 0, 1), (1.0, 0, 1.0), (2.0, 0, 2), (0.5, 1, 0.5), (0, 1, None), (0.0, 1, None),
     (1.5, 0, None), (-0.1, 0, None), (True, 0, None), ("1", 0, None)],
)  # fmt: skip
def test_fraction_or_count(value, least, result):
    if result is None:
        with pytest.raises(ConfigurationError, match=r"int of at least . for a number of batches, or a float"):
            checks.fraction_or_count("limit", value, least=least)
    else:
        got = checks.fraction_or_count("limit", value, least=least)
        assert got == result and type(got) is type(result)
