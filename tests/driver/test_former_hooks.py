from __future__ import annotations

import logging

import pytest
from tiny import Tiny, data

from raytrainer import Callback, ConfigurationError, DataModule, Module, WorkerCallback


def fit_with(owner, local_trainer, caplog):
    """As the module, a callback or the DataModule, whichever it is."""
    callbacks = [owner] if isinstance(owner, (Callback, WorkerCallback)) else []
    loaders = {"datamodule": owner} if isinstance(owner, DataModule) else {"train_dataloaders": data(4)}
    with caplog.at_level(logging.WARNING, "raytrainer"):
        local_trainer(max_epochs=1, callbacks=callbacks).fit(owner if isinstance(owner, Tiny) else Tiny(), **loaders)


@pytest.mark.parametrize("name", ["training_epoch_end", "validation_epoch_end", "test_epoch_end"])
@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_hooks_that_had_outputs(name, verb, local_trainer):
    module = type("Old", (Tiny,), {name: lambda self, outputs: None})()
    with pytest.raises(ConfigurationError, match=rf"Old\.{name} is never called: it is on_\w+_epoch_end\(self\) now"):
        getattr(local_trainer(max_epochs=1), verb)(module, data(4))


@pytest.mark.parametrize("base", [Tiny, Callback, WorkerCallback])
def test_hooks_with_other_names(base, local_trainer, caplog):
    owner = type("Old", (base,), {"on_epoch_end": lambda self, *args: pytest.fail("called")})()
    fit_with(owner, local_trainer, caplog)
    assert "Old.on_epoch_end is not called by the Trainer; there is on_train_epoch_end" in caplog.text


@pytest.mark.parametrize(
    ("base", "name", "meant"),
    [
        (Tiny, "predict_steps", "predict_step"),
        (Tiny, "on_fit_starts", "on_fit_start"),
        (Tiny, "val_dataloaders", "val_dataloader"),
        (Callback, "on_train_epoc_end", "on_train_epoch_end"),
        (WorkerCallback, "on_train_batchend", "on_train_batch_end"),
    ],
)
def test_misspelt_hooks(base, name, meant, local_trainer, caplog):
    owner = type("Typed", (base,), {name: lambda self, *args: pytest.fail("called")})()
    fit_with(owner, local_trainer, caplog)
    assert f"Typed.{name} is not called by the Trainer: did you mean {meant}?" in caplog.text


def test_a_helper_beside_the_hook_is_no_mistake(local_trainer, caplog):
    module = type("Helped", (Tiny,), {"training_steps": lambda self: None, "validation_step_": lambda self: None})()
    with caplog.at_level(logging.WARNING, "raytrainer"):
        local_trainer(max_epochs=1).fit(module, data(4))
    assert "did you mean" not in caplog.text


def test_a_misspelt_step_is_named(local_trainer):
    class Typed(Module):
        def traning_step(self, batch):
            pass

        def configure_optimizer(self):
            pass

    with pytest.raises(ConfigurationError, match=r"no training_step\(\).*There is Typed.traning_step\(\)"):
        local_trainer(max_epochs=1).fit(Typed(), data(4))


@pytest.mark.parametrize("in_class", [True, False])
def test_misspelt_flags_are_warned_of(in_class, local_trainer, caplog):
    class Odd(Tiny):
        automatic_optimization = True

    odd = Odd()
    (Odd if in_class else odd).automatic_optimisation = False
    local_trainer(max_epochs=1).fit(odd, data(4))
    assert (
        "Odd.automatic_optimisation means nothing to the Trainer: did you mean automatic_optimization?" in caplog.text
    )
    assert caplog.text.count("means nothing") == 1


def test_misspelt_hooks_of_a_datamodule_are_warned_of(local_trainer, caplog):
    class Odd(DataModule):
        def train_dataloader(self):
            return data(4)

        def val_dataloder(self):
            return data(4)

        def train_loader(self):
            """One's own."""

    local_trainer(max_epochs=1).fit(Tiny(), datamodule=Odd())
    assert "Odd.val_dataloder is not called by the Trainer: did you mean val_dataloader?" in caplog.text
    assert caplog.text.count("is not called by the Trainer") == 1


@pytest.mark.parametrize(
    ("base", "name", "homes"),
    [
        (WorkerCallback, "on_sanity_check_start", "Callback"),
        (WorkerCallback, "on_train_chunk_end", "Callback"),
        (WorkerCallback, "configure_optimizers", "Module"),
        (Callback, "train_dataloader", "Module and DataModule"),
        (Tiny, "on_sanity_check_end", "Callback"),
        (DataModule, "on_train_epoch_end", "Module and Callback and WorkerCallback"),
        (DataModule, "validation_step", "Module"),
    ],
)
def test_hooks_of_another_class_are_warned_of(base, name, homes, local_trainer, caplog):
    owner = type("Odd", (base,), {name: lambda self, *args: pytest.fail("called")})()
    if base is DataModule:
        type(owner).train_dataloader = lambda self: data(4)
    fit_with(owner, local_trainer, caplog)
    kind = "Module" if base is Tiny else base.__name__
    assert f"Odd.{name} is not called by the Trainer: it is a hook of {homes}, not of a {kind}." in caplog.text
    assert caplog.text.count("is not called") == 1


def test_what_is_two_things_at_once_has_the_hooks_of_both(local_trainer, caplog):
    class Both(DataModule, WorkerCallback):
        def setup(self, *args):
            pass

        teardown = on_exception = state_dict = load_state_dict = setup

        def train_dataloader(self):
            return data(4)

        def on_train_epoch_end(self, trainer, module):
            pass

    both = Both()
    with caplog.at_level(logging.WARNING, "raytrainer"):
        local_trainer(max_epochs=1, callbacks=[both]).fit(Tiny(), datamodule=both)
    assert "is not called" not in caplog.text
