"""Verbs: declared once, each with a limit; what is none is refused."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest

from raytrainer.driver.workers.local_group import LocalGroup
from raytrainer.worker.verbs import Wait, verb_of
from raytrainer.worker.worker import Worker

#: Methods of a worker that are for whoever holds it, rather than for the driver.
OWN = {"obey", "capture"}

METHODS = {name: value for name, value in inspect.getmembers(Worker, inspect.isfunction) if not name.startswith("_")}


def test_every_method_is_a_verb_or_known_to_be_none():
    assert {name for name, method in METHODS.items() if not hasattr(method, "verb")} == OWN
    assert all(verb_of(method).name == name for name, method in METHODS.items() if name not in OWN)


@pytest.mark.parametrize("hang_timeout", [None, 0.5, 600.0])
def test_every_wait_has_a_limit(hang_timeout):
    for wait in Wait:
        assert 0 < wait.seconds(hang_timeout) < math.inf
    assert Wait.TRAINING.seconds(0.5) == 0.5 and Wait.USER_CODE.seconds(0.5) > 3600


def test_what_counts_as_training():
    counting = {name for name, method in METHODS.items() if name not in OWN and verb_of(method).wait is Wait.TRAINING}
    assert counting == {"train", "report_steps", "evaluate", "prepare_capture", "fingerprints", "compare"}


def test_what_is_no_verb_is_refused():
    with pytest.raises(TypeError, match="declare it with @verb"):
        LocalGroup().call(Worker.capture)


def test_the_driver_names_verbs_by_their_methods():
    """Strings would escape mypy."""
    root = Path(inspect.getfile(Worker)).parents[1]
    calls = [line for path in (root / "driver").rglob("*.py") for line in path.read_text().splitlines()]
    told = [line.strip() for line in calls if "group.call(" in line]
    assert len(told) > 15
    assert [line for line in told if "group.call(Worker." not in line] == []
