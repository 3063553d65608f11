"""A Trainer's arguments are declared once; signature, help, page and attributes come from that."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest

import raytrainer
from raytrainer.driver_arguments import TrainerArguments
from raytrainer.plan.declaring import argument, arguments, documented, meanings
from raytrainer.plan.run_arguments import RunArguments
from raytrainer.plan.settings import build_settings
from raytrainer.reference import arguments_page

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_from_the_declarations():
    page = (ROOT / "examples" / "guide" / "trainer-arguments.md").read_text()
    assert page == arguments_page(), "run: python -m raytrainer.reference > examples/guide/trainer-arguments.md"


def test_every_argument_has_a_meaning():
    parameters = inspect.signature(raytrainer.Trainer).parameters
    assert list(meanings(TrainerArguments)) == list(parameters)
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    lines = raytrainer.Trainer.__doc__.splitlines()
    assert {name for name in parameters if not any(line.startswith(f"    {name}: ") for line in lines)} == set()


def test_arguments_are_readable_afterwards(local_trainer):
    trainer = local_trainer(
        limit_train_batches=3, limit_val_batches=0.5, accumulate_grad_batches=2, gradient_clip_val=1, precision=16,
        log_every_n_steps=7, check_val_every_n_epoch=2, num_sanity_val_steps=0, max_steps=9, idle_timeout=4,
    )  # fmt: skip
    assert (trainer.limit_train_batches, trainer.limit_val_batches, trainer.limit_test_batches) == (3, 0.5, 1.0)
    assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.precision) == (2, 1.0, "16-mixed")
    assert (trainer.log_every_n_steps, trainer.check_val_every_n_epoch, trainer.num_sanity_val_steps) == (7, 2, 0)
    assert (trainer.max_steps, trainer.max_epochs, trainer.idle_timeout) == (9, -1, 4.0)
    assert (trainer.val_check_interval, trainer.overfit_batches, trainer.enable_progress_bar) == (1.0, 0.0, False)
    assert (local_trainer().max_steps, local_trainer().max_epochs) == (-1, 1000)
    assert local_trainer(max_epochs=-1).max_epochs == -1
    dry = local_trainer(fast_dev_run=2, max_epochs=5)
    assert (dry.max_epochs, dry.limit_train_batches, dry.fast_dev_run) == (1, 2, 2)


def test_every_argument_is_readable(local_trainer):
    trainer = local_trainer()
    for name in inspect.signature(raytrainer.Trainer).parameters:
        getattr(trainer, name)


def test_arguments_stay_as_they_are(local_trainer):
    trainer = local_trainer(max_epochs=3)
    with pytest.raises(AttributeError, match=r"trainer\.max_epochs stays as it is: make a new Trainer\(max_epochs=5"):
        trainer.max_epochs = 5
    assert copy.copy(trainer).max_epochs == trainer.max_epochs == 3
    with pytest.raises(AttributeError):
        build_settings().max_epochs = 3


def test_a_misspelt_argument_is_refused_in_the_trainers_name():
    with pytest.raises(TypeError, match=r"^Trainer has no argument 'max_epoch': did you mean 'max_epochs'\?"):
        raytrainer.Trainer(max_epoch=3)
    with pytest.raises(TypeError, match=r"^Trainer takes all arguments by name, and was given 3: write name=value\."):
        raytrainer.Trainer(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement_timeout": -1}, "placement_timeout=-1: give seconds"),
        ({"idle_timeout": "5"}, "idle_timeout='5': give seconds"),
        ({"enable_progress_bar": 1}, "enable_progress_bar=1: give True or False"),
        ({"enable_checkpointing": None}, "enable_checkpointing=None"),
    ],
)
def test_what_the_driver_alone_uses_is_checked_too(options, message, local_trainer):
    with pytest.raises(raytrainer.ConfigurationError, match=message):
        local_trainer(**options)


def test_settings_have_every_argument():
    settings = build_settings(max_epochs=2)
    assert isinstance(settings, RunArguments)
    assert settings.max_epochs == 2


def test_a_declaration_is_all_there_is_to_an_argument():
    @documented
    @arguments
    class Own(RunArguments):
        """Something.

        Raises:
            Nothing.
        """

        colour: str = argument(default="red")
        """What it looks like,
        in words."""

    assert Own().colour == "red" and Own(colour="blue", max_epochs=3).max_epochs == 3
    assert "colour" in inspect.signature(Own).parameters
    assert "    colour: What it looks like, in words.\n" in Own.__doc__
    assert Own.__doc__.index("max_epochs:") < Own.__doc__.index("colour:") < Own.__doc__.index("Raises:")
    with pytest.raises(TypeError, match="color"):
        Own(color="blue")
