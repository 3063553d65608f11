"""What is said to a name that there is not."""

from __future__ import annotations

import inspect

import pytest

import raytrainer
from raytrainer.errors import ConfigurationError, UnknownArgumentError
from raytrainer.plan.argument_names import ELSEWHERE, unknown_argument
from raytrainer.plan.names_elsewhere import EXPORTED, STRATEGIES_ELSEWHERE

OURS = list(inspect.signature(raytrainer.Trainer).parameters)


def test_what_stands_for_it_here_is_not_an_argument_itself():
    assert not set(ELSEWHERE) & set(OURS)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_arguments_of_other_trainers_are_answered(name):
    with pytest.raises(UnknownArgumentError, match=f"^Trainer has no argument '{name}'. Here: "):
        raytrainer.Trainer(**{name: 1})


def test_what_other_packages_export_is_answered():
    for name, here in EXPORTED.items():
        with pytest.raises(AttributeError, match=f"no attribute '{name}'; here that is "):
            getattr(raytrainer, name)
        assert name not in raytrainer.__all__, here


@pytest.mark.parametrize("name", STRATEGIES_ELSEWHERE)
def test_strategies_of_others_are_answered(name):
    with pytest.raises(raytrainer.ConfigurationError, match=f"strategy='{name}': here that is strategy="):
        raytrainer.Trainer(strategy=name)


@pytest.mark.parametrize("answer", [*ELSEWHERE.values(), *EXPORTED.values(), *STRATEGIES_ELSEWHERE.values()])
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
