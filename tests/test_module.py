"""A Module by itself and during a run: device, ranks, hyperparameters, freezing, logging outside."""

from __future__ import annotations

import inspect
import logging
import pickle
from argparse import Namespace

import pytest
import torch
from tiny import Tiny, data

import raytrainer
from raytrainer import Callback, ConfigurationError, DataModule, Module, WorkerCallback


@pytest.mark.parametrize("name", ["training_step", "validation_step", "test_step", "predict_step"])
def test_help_tells_how_to_write_a_step(name):
    told = inspect.getdoc(getattr(Module, name))
    assert "batch" in told and ("validation_step" in told or "batch_idx)" in told)
    assert "Returns:" in told or name == "test_step"


def test_outside_of_a_run():
    module = Tiny()
    assert (module.global_rank, module.local_rank, module.global_step, module.current_epoch) == (0, 0, 0, 0)
    assert module.device == torch.device("cpu") and module.dtype == torch.float32 and module.logger is None
    with pytest.raises(RuntimeError, match="Tiny is not attached to a Trainer"):
        _ = module.trainer
    for attribute in ("all_gather", "optimizers", "lr_schedulers"):
        with pytest.raises(RuntimeError, match="not attached"):
            getattr(module, attribute)(*([torch.ones(1)] if attribute == "all_gather" else []))


def test_log_outside_of_a_run_says_so(caplog):
    root = logging.getLogger("raytrainer")
    root.addHandler(caplog.handler)
    try:
        Tiny().log("x", 1.0)
    finally:
        root.removeHandler(caplog.handler)
    assert "self.log('x', ...) has no effect outside of a run" in caplog.text


def test_device_follows_the_module():
    module = Tiny().to("meta")
    assert module.device.type == "meta"
    empty = Module().to("meta")  # without any parameter
    assert empty.device.type == "meta"
    assert Module().double().device.type == "cpu" and Tiny().double().dtype == torch.float64
    outer = torch.nn.ModuleList([Tiny()]).to("meta")
    assert outer[0].device.type == "meta"


def test_freeze_and_unfreeze():
    module = Tiny()
    assert module.freeze() is module
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert module.unfreeze() is module
    assert module.training and all(p.requires_grad for p in module.parameters())


def test_pickling_leaves_the_run_behind(local_trainer):
    class Keeping(Callback):
        def on_train_epoch_end(self, trainer, module):
            self.copy = pickle.loads(pickle.dumps(module))

    keeping = Keeping()
    local_trainer(max_epochs=1, callbacks=keeping).fit(Tiny(), data())
    with pytest.raises(RuntimeError, match="not attached"):
        _ = keeping.copy.trainer


def test_during_a_run(local_trainer):
    class Looking(Tiny):
        def training_step(self, batch, batch_idx):
            trainer = self.trainer
            assert (self.global_step, self.current_epoch) == (trainer.global_step, trainer.current_epoch)
            assert self.global_step == 10 * self.current_epoch + batch_idx
            assert trainer.training and not trainer.validating and trainer.is_global_zero
            assert (trainer.world_size, trainer.num_nodes, trainer.num_training_batches) == (1, 1, 10)
            assert (trainer.max_epochs, trainer.max_steps, trainer.num_val_batches) == (2, -1, [2])
            gathered = self.all_gather({"x": torch.arange(2), "n": 3})
            assert torch.equal(gathered["x"], torch.arange(2)[None]) and gathered["n"].tolist() == [3]
            loss = self.loss(batch)
            assert self.all_gather(loss, sync_grads=True).requires_grad
            assert not self.all_gather(loss).requires_grad
            return loss

        def validation_step(self, batch, batch_idx):
            assert (self.trainer.sanity_checking or self.trainer.validating) and not self.trainer.training

        def setup(self, stage):
            assert stage == "fit" and self.device.type == "cpu"

    module = Looking()
    trainer = local_trainer(max_epochs=2)
    trainer.fit(module, data(), data(4))
    assert module.current_epoch == 2 and module.trainer is trainer  # outside again


STAGES = {"fit": "training", "validate": "validating", "test": "testing", "predict": "predicting"}


@pytest.mark.parametrize("verb", STAGES)
def test_hooks_around_a_run_know_what_it_is(verb, local_trainer):
    """As in Lightning: setup too, on the driver and in workers."""
    seen = []

    def look(trainer):
        seen.append([name for name in STAGES.values() if getattr(trainer, name)])

    class Looks(Tiny):
        def setup(self, stage):
            look(self.trainer)

        on_fit_start = on_fit_end = on_train_start = on_train_end = lambda self: look(self.trainer)
        test_step = predict_step = lambda self, batch, batch_idx: None

        def teardown(self, stage):
            look(self.trainer)

    class Driver(Callback):
        def setup(self, trainer, module, stage):
            look(trainer)

        def on_fit_start(self, trainer, module):
            look(trainer)

    trainer = local_trainer(max_epochs=1, callbacks=Driver())
    getattr(trainer, verb)(Looks(), data(4))
    assert seen == [[STAGES[verb]]] * (8 if verb == "fit" else 3)
    assert not any(getattr(trainer, name) for name in STAGES.values())


def test_layers_made_in_the_worker(local_trainer):
    class Lazy(Tiny):
        def __init__(self):
            super().__init__()
            self.head = None

        def configure_model(self):
            if self.head is None:
                self.head = torch.nn.Linear(2, 2)
                self.made = self.trainer.world_size

        def setup(self, stage):
            self.body = torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x))

    module = Lazy()
    local_trainer(max_epochs=1, precision=64).fit(module, data())
    assert module.head.weight.grad is not None and module.head.weight.dtype == module.body.weight.dtype == torch.float64


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_callbacks_that_the_module_asks_for(verb, local_trainer):
    class Own(Callback):
        calls = 0

        def setup(self, trainer, module, stage):
            self.calls += 1

    class Beside(WorkerCallback):
        calls = 0

        def setup(self, trainer, module, stage):
            self.calls += 1

    class Asking(Tiny):
        def configure_callbacks(self):
            return [own, beside]

    replaced, own, beside = Own(), Own(), Beside()
    trainer = local_trainer(max_epochs=1, callbacks=replaced)
    for _ in range(2):
        getattr(trainer, verb)(Asking(), data(4))
    assert (replaced.calls, own.calls, beside.calls) == (0, 2, 2)


def test_batch_level_hooks_on_the_driver_are_refused(local_trainer):
    class Wrong(Callback):
        def on_train_batch_end(self, *args): ...

    with pytest.raises(
        ConfigurationError, match=r"Wrong is a Callback.*on_train_batch_end.*derive it from WorkerCallback"
    ):
        local_trainer(callbacks=Wrong())
    with pytest.raises(ConfigurationError, match=r"callback 3: give a raytrainer Callback"):
        local_trainer(callbacks=[3])


def test_batch_transfer_hooks(local_trainer):
    class Changing(Tiny):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            self.events.append("before")
            return {"pair": batch}

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            assert device == self.device
            self.events.append("to")
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.events.append("after")
            return batch["pair"]

        def on_train_batch_start(self, batch, batch_idx):
            assert len(batch) == 2

    module = Changing()
    local_trainer(max_steps=1).fit(module, data())
    assert module.events[:4] == ["before", "to", "after", "t"]


# ---------------------------------------------------------------- hyperparameters


class Base(Module):
    def __init__(self, a, b=2, *args, c=3, **kwargs):
        super().__init__()
        self.save_hyperparameters()


class Derived(Base):
    def __init__(self, b, d=4):
        super().__init__(1, b=b + 10, c=5, e=6)
        self.save_hyperparameters()


class Some(Module):
    def __init__(self, a, b, net=None):
        super().__init__()
        self.save_hyperparameters("a", logger=False)


class Given(Module):
    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters(config)


class Ignoring(DataModule):
    def __init__(self, path, secret, other=None):
        super().__init__()
        local = 3  # noqa: F841  # a local variable is no hyperparameter
        self.save_hyperparameters(ignore=["secret", "other"])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Base(1), {"a": 1, "b": 2, "c": 3}),
        (lambda: Base(1, 5, c=7, extra=8), {"a": 1, "b": 5, "c": 7, "extra": 8}),
        (lambda: Derived(1), {"a": 1, "b": 1, "c": 5, "d": 4, "e": 6}),
        (lambda: Some(1, 2), {"a": 1}),
        (lambda: Given({"x": 1}), {"x": 1}),
        (lambda: Given(Namespace(x=1)), {"x": 1}),
        (lambda: Ignoring("p", "s"), {"path": "p"}),
        (lambda: Tiny(), {}),
    ],
)
def test_hyperparameters(make, expected):
    made = make()
    assert dict(made.hparams) == expected


def test_hyperparameters_are_attributes_and_may_change():
    module = Base([1])
    module.hparams.a.append(2)
    module.hparams.b = 9
    module.hparams["c"] = 8
    assert module.hparams == {"a": [1, 2], "b": 9, "c": 8}
    assert module.hparams_initial == {"a": [1], "b": 2, "c": 3}
    del module.hparams.b
    with pytest.raises(AttributeError, match=r"no hyperparameter 'b'; there are \['a', 'c'\]"):
        _ = module.hparams.b


def test_hyperparameters_that_are_no_arguments():
    class Wrong(Module):
        def __init__(self, a):
            super().__init__()
            self.save_hyperparameters("lr")

    with pytest.raises(ConfigurationError, match=r"\['lr'\] are not arguments of Wrong\.__init__, which has \['a'\]"):
        Wrong(1)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "1"])
def test_seeds_that_are_none(seed):
    with pytest.raises(ConfigurationError, match=r"seed_everything\(.*from 0 to"):
        raytrainer.seed_everything(seed)


def test_seed_everything_seeds_every_generator():
    numpy = pytest.importorskip("numpy")
    import random

    def draw():
        return random.random(), torch.rand(()).item(), numpy.random.rand()

    raytrainer.seed_everything(3, verbose=False)
    first = draw()
    assert draw() != first
    raytrainer.seed_everything(3, verbose=False)
    assert draw() == first
    assert isinstance(raytrainer.seed_everything(verbose=False), int)


def test_manual_optimization_as_the_class_says(local_trainer):
    class Manual(Tiny):
        automatic_optimization = False
        strict_loading = False
        steps = 0

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()
            self.steps += 1

    module = Manual()
    assert not module.automatic_optimization and not module.strict_loading
    assert Tiny().automatic_optimization and Tiny().strict_loading
    trainer = local_trainer(max_epochs=1)
    trainer.fit(module, data())
    assert trainer.global_step == module.steps > 0


class Sized(DataModule):
    def __init__(self, batch_size=2):
        super().__init__()
        self.save_hyperparameters()
        self.told = []

    def train_dataloader(self):
        return data(4, self.hparams.batch_size)

    def val_dataloader(self):
        raise ValueError("no such file")

    def on_exception(self, exception):
        self.told.append(exception)


@pytest.mark.parametrize("where", ["data", "module", "callback", "driver"])
def test_datamodule_and_callbacks_are_told_of_errors_once(where, local_trainer):
    class Failing(Tiny):
        def training_step(self, batch, batch_idx):
            if where == "module":
                raise ValueError("no such step")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            pass

    class Beside(WorkerCallback):
        def __init__(self):
            self.told = []

        def on_train_batch_end(self, *args):
            if where == "callback":
                raise ValueError("no such place")

        def on_exception(self, trainer, module, exception):
            self.told.append(exception)

    class OnTheDriver(Callback):
        def on_train_epoch_start(self, trainer, module):
            if where == "driver":
                raise ValueError("no such end")

    datamodule, beside = Sized(), Beside()
    limit = 1.0 if where == "data" else 0
    trainer = local_trainer(max_epochs=1, callbacks=[beside, OnTheDriver()], limit_val_batches=limit)
    with pytest.raises(ValueError, match="no such") as raised:
        trainer.fit(Failing(), datamodule=datamodule)
    assert datamodule.told == beside.told == [raised.value]
