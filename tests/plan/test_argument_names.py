"""What is said to a name that there is not."""

from __future__ import annotations

import inspect

import pytest

import raytrainer
from raytrainer.errors import ConfigurationError, UnknownArgumentError
from raytrainer.plan.argument_names import ELSEWHERE, unknown_argument

OURS = list(inspect.signature(raytrainer.Trainer).parameters)


def test_what_stands_for_it_here_is_not_an_argument_itself():
    assert not set(ELSEWHERE) & set(OURS)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_arguments_of_other_trainers_are_answered(name):
    with pytest.raises(UnknownArgumentError, match=f"^Trainer has no argument '{name}'. Here: "):
        raytrainer.Trainer(**{name: 1})


@pytest.mark.parametrize("answer", ELSEWHERE.values())
def test_answers_name_what_there_is(answer):
    import re

    for argument in re.findall(r"(?<![\w.(])(\w+)=", re.sub(r"\([^)]*\)", "", answer)):
        assert argument in {*OURS, "ckpt_path"}, argument
    for name in re.findall(r"raytrainer\.(\w+)", answer):
        assert hasattr(raytrainer, name), name
    for name in re.findall(r"trainer\.(\w+)\(", answer):
        assert hasattr(raytrainer.Trainer, name) or name in raytrainer.__all__, name


def test_nearest_names_and_all_names():
    assert unknown_argument("Thing", "colour", ["color", "size"]) == (
        "Thing has no argument 'colour': did you mean 'color'?"
    )
    assert unknown_argument("Thing", "xyz", ["color", "size"]) == "Thing has no argument 'xyz': there are color, size."


def test_it_can_be_caught_as_what_python_raises_and_as_ours():
    for kind in (TypeError, ConfigurationError):
        with pytest.raises(kind):
            raytrainer.Trainer.from_config({"max_epoch": 1})
