"""Finding a learning rate and a batch size: what is found, and that nothing else has changed."""

from __future__ import annotations

import os
import random
import signal
import threading
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Tiny, data
from torch.utils.data import DataLoader, TensorDataset

from raytrainer import (
    BatchSizeFinder,
    Callback,
    ConfigurationError,
    DataModule,
    LearningRateFinder,
    ResourceError,
)
from raytrainer.plan.searches import rates


class Learner(Tiny):
    """Dropout and noise draw random numbers; `seen` counts batches in this object."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__(lr)
        self.save_hyperparameters()
        self.drop = torch.nn.Dropout(0.1)
        self.register_buffer("seen", torch.zeros(()))
        self.used: list[float] = []

    def training_step(self, batch, batch_idx):
        self.seen += 1
        random.random(), np.random.rand()
        self.used.append(self.optimizers().param_groups[0]["lr"])
        return self.loss((self.drop(batch[0]), batch[1]))

    def configure_callbacks(self):
        return [Untouched()]

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer), "interval": "step"}]


class Untouched(Callback):
    """Must see the user's own runs only."""

    def __init__(self) -> None:
        self.fits = 0

    def on_fit_start(self, trainer, module):
        self.fits += 1


def learnable(samples: int = 64, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=generator)
    return DataLoader(TensorDataset(x, 2.0 * x[:, :2] + 3.0), batch_size=batch_size, **options)


def world(module: torch.nn.Module, *others: torch.Generator) -> list[Any]:
    """Everything that a search must leave alone."""
    state = [(name, value.clone()) for name, value in module.state_dict().items()]
    generators = [torch.get_rng_state(), *(generator.get_state() for generator in others)]
    flags = [(name, part.training) for name, part in module.named_modules()]
    attributes = {k: v for k, v in module.__dict__.items() if k in ("used", "lr", "events")}
    others_state = [random.getstate(), np.random.get_state()[1].tolist()]
    return [state, generators, others_state, flags, repr(attributes), module.hparams.copy()]


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_lr_find(local_trainer, tmp_path):
    module, generator = Learner(), torch.Generator().manual_seed(2)
    own = Untouched()
    loud = {"logger": True, "enable_checkpointing": True, "enable_progress_bar": True}
    trainer = local_trainer(max_epochs=2, callbacks=own, **loud)
    loader = learnable(batch_size=64, shuffle=True, generator=generator)
    before = world(module, generator)
    found = trainer.lr_find(module, loader, min_lr=1e-6, max_lr=10.0, num_training=60)
    assert alike(before, world(module, generator))
    assert own.fits == 0 and list(tmp_path.iterdir()) == [] and trainer.global_step == 0 and trainer.state.fn is None
    lrs, losses = found.results["lr"], found.results["loss"]
    assert lrs[0] == 1e-6 and lrs == sorted(lrs) and len(lrs) == len(losses) == len(found.results["raw"]) <= 60
    assert 1e-3 < found.suggestion() < 1.0
    assert found.suggestion() in lrs and found.attribute is None
    # it has learnt: at the suggestion the loss is lower than with the smallest rates
    assert losses[lrs.index(found.suggestion())] < losses[10]


def test_losses_are_those_of_training_step_where_gradients_are_accumulated(local_trainer):
    class Constant(Learner):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0 + 3

    found = local_trainer(accumulate_grad_batches=2).lr_find(Constant(), learnable(batch_size=64), num_training=3)
    assert found.results["raw"] == [3.0] * 3


def test_the_rates_are_those_of_the_steps(local_trainer):
    seen: list[float] = []

    class Seeing(Learner):
        def training_step(self, batch, batch_idx):
            seen.append(self.optimizers().param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    found = local_trainer(accumulate_grad_batches=2).lr_find(
        Seeing(), learnable(), num_training=20, max_lr=1e-3, early_stop_threshold=None
    )
    assert seen[::2] == seen[1::2] == found.results["lr"] and len(seen) == 40


def test_it_stops_where_the_loss_diverges(local_trainer, monkeypatch):
    monkeypatch.setattr("raytrainer.plan.steps_and_epochs.chunk_batches", lambda *a, **k: 1)
    before = [0.01, *[2.0, 1.0] * 6]  # the first tenth of the steps, of which the first is not the best, and three more
    losses = iter(before + [1e9] * 87)
    steps: list[int] = []

    class Diverging(Learner):
        def training_step(self, batch, batch_idx):
            steps.append(1)
            return super().training_step(batch, batch_idx) * 0.0 + next(losses)

    found = local_trainer().lr_find(Diverging(), learnable())
    assert len(steps) == 14 and found.results["raw"] == pytest.approx(before)


@pytest.mark.parametrize("kept_in", ["hparams", "attribute"])
def test_the_finder_sets_the_rate_that_fit_uses(kept_in, local_trainer):
    class Own(Learner):
        def __init__(self):
            super().__init__()
            if kept_in == "attribute":
                self.hparams.clear()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.hparams.lr if kept_in == "hparams" else self.lr)

    finder, module = LearningRateFinder(min_lr=1e-6, max_lr=10.0, num_training=60), Own()
    local_trainer(max_epochs=1, callbacks=finder).fit(module, learnable())
    rate = finder.result.suggestion()
    assert module.lr == rate != 0.02
    assert module.used == [rate] * 8 and int(module.seen) == 8


def test_finders_leave_a_resumed_run_alone(local_trainer, tmp_path):
    trainer = local_trainer(max_epochs=1)
    trainer.fit(Learner(), learnable())
    trainer = local_trainer(max_epochs=1)
    module = Learner()
    trainer.fit(module, learnable())
    from raytrainer import ModelCheckpoint

    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    local_trainer(max_epochs=1, callbacks=checkpoint).fit(Learner(), learnable())
    finder, module = LearningRateFinder(), Learner()
    local_trainer(max_epochs=2, callbacks=finder).fit(module, learnable(), ckpt_path=checkpoint.last_model_path)
    assert finder.result is None and module.hparams.lr == 0.02


def test_a_plot(local_trainer):
    pytest.importorskip("matplotlib")
    found = local_trainer().lr_find(Learner(), learnable(), max_lr=10.0, num_training=60)
    figure = found.plot()
    curve, mark = figure.axes[0].lines
    assert curve.get_xdata().tolist() == found.results["lr"] and mark.get_xdata().tolist() == [found.suggestion()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"min_lr": 2.0}, "min_lr"), ({"num_training": 1}, "num_training"), ({"early_stop_threshold": 0.5}, "threshold"),
     ({"update_attr": True, "attr_name": "rate"}, "'rate'")],
)  # fmt: skip
def test_wrong_arguments_of_lr_find(arguments, words, local_trainer):
    with pytest.raises(ConfigurationError, match=words):
        local_trainer().lr_find(Learner(), learnable(), **arguments)


def test_lr_find_needs_a_loss(local_trainer):
    class Silent(Learner):
        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(ConfigurationError, match="returned no loss"):
        local_trainer().lr_find(Silent(), learnable())


def test_batches_without_a_loss_are_skipped(local_trainer):
    class Skipping(Learner):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if len(self.used) in (1, 7, 20) else loss

    found = local_trainer().lr_find(Skipping(), learnable(), num_training=20, early_stop_threshold=None)
    lrs = rates(1e-8, 1.0, 20, "exponential")
    assert found.results["lr"] == [rate for step, rate in enumerate(lrs, start=1) if step not in (1, 7, 20)]
    assert len(found.results["raw"]) == 17


@pytest.mark.parametrize("optimizers", [1, 2])
def test_manual_optimization_that_steps_schedulers(optimizers, local_trainer):
    used = []

    class Manual(Learner):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss, given = self.loss(batch), self.optimizers()
            given = given if isinstance(given, list) else [given]
            given[0].zero_grad()
            self.manual_backward(loss)
            used.append(given[0].param_groups[0]["lr"])
            for optimizer in given:
                optimizer.step()
            for scheduler in self.lr_schedulers():
                scheduler.step(loss.detach()) if scheduler is self.lr_schedulers()[0] else scheduler.step()
            return loss

        def configure_optimizers(self):
            made = [torch.optim.SGD(self.parameters(), 0.02) for _ in range(optimizers)]
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(made[0], patience=0)
            later = torch.optim.lr_scheduler.ConstantLR(made[0])
            return made, [{"scheduler": plateau, "monitor": "val_loss"}, later]

    found = local_trainer().lr_find(Manual(), learnable(), num_training=40, early_stop_threshold=None)
    assert found.results["lr"] == used and used[-1] > 0.01


@pytest.mark.parametrize("steps", [5, 12])
def test_few_steps_are_enough_for_a_suggestion(steps, local_trainer):
    found = local_trainer().lr_find(
        Learner(), learnable(batch_size=64), min_lr=1e-3, num_training=steps, early_stop_threshold=None
    )
    assert found.suggestion() in found.results["lr"] and found.suggestion(skip_begin=12) is None


# ---------------------------------------------------------------- batch size


class Sized(DataModule):
    def __init__(self, batch_size: int = 5, samples: int = 1000) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return data(self.hparams.samples, self.hparams.batch_size)


class Hungry(Learner):
    """Runs out of memory above a size."""

    most = 37
    error: Any = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if len(batch[0]) > self.most:
            raise self.error
        return loss


@pytest.mark.sample(2)
@pytest.mark.parametrize(("mode", "best"), [("power", 32), ("binsearch", 37)])
@pytest.mark.parametrize(
    "error",
    [Hungry.error, RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()],
    ids=["cuda", "cpu", "py"],
)
def test_scale_batch_size(mode, best, error, local_trainer, tmp_path):
    module, sized = Hungry(), Sized()
    module.error = error
    trainer = local_trainer(max_epochs=1, limit_train_batches=1)
    before = world(module)
    assert trainer.scale_batch_size(module, datamodule=sized, mode=mode) == best
    assert alike(before, world(module))
    assert sized.hparams.batch_size == best and list(tmp_path.iterdir()) == [] and trainer.global_step == 0


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("arguments", "best"),
    [
        ({"mode": "binsearch", "margin": 0.1}, 33),
        ({"mode": "power", "margin": 0.1}, 32),
        ({"mode": "power", "max_val": 20}, 20),
        ({"mode": "binsearch", "max_val": 20}, 20),
        ({"init_val": 8, "max_val": 4}, 4),
    ],
)
def test_less_than_the_largest_size(arguments, best, local_trainer):
    sized, finder = Sized(), BatchSizeFinder(**arguments)
    local_trainer(max_epochs=1, callbacks=finder).fit(Hungry(), sized)
    assert finder.optimal_batch_size == sized.hparams.batch_size == best


def test_the_module_may_have_the_size(local_trainer):
    class Own(Hungry):
        batch_size = 4

        def train_dataloader(self):
            return data(100, self.batch_size)

    module = Own()
    assert local_trainer().scale_batch_size(module) == 32 == module.batch_size and Own.batch_size == 4


def test_one_batch_with_all_the_data_is_enough(local_trainer):
    class Full(Hungry):
        most = 10**9

    assert local_trainer().scale_batch_size(Full(), Sized(samples=50)) == 64


def test_schedulers_are_left_out(local_trainer):
    class Waiting(Hungry):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.01)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    assert local_trainer().scale_batch_size(Waiting(), Sized(samples=30)) == 32
    assert local_trainer().lr_find(Waiting(), learnable(), num_training=20).results["lr"]


def test_nothing_fits(local_trainer):
    class Starved(Hungry):
        most = 0

    sized = Sized()
    with pytest.raises(ResourceError, match="no batch size from 4 down to 1"):
        local_trainer().scale_batch_size(Starved(), sized, init_val=4)
    assert sized.hparams.batch_size == 5


def test_other_errors_are_raised_and_the_size_is_put_back(local_trainer):
    module, sized = Hungry(), Sized()
    module.error = RuntimeError("shapes cannot be multiplied")
    before = world(module)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        local_trainer().scale_batch_size(module, sized)
    assert sized.hparams.batch_size == 5 and alike(before, world(module))


def test_the_finder_sets_the_size_that_fit_uses(local_trainer):
    module, finder, sized = Hungry(), BatchSizeFinder(mode="binsearch"), Sized()
    trainer = local_trainer(max_epochs=1, callbacks=[finder])
    trainer.fit(module, sized)
    assert finder.optimal_batch_size == sized.hparams.batch_size == 37
    assert trainer.num_training_batches == 28 == int(module.seen)


def test_wrong_arguments_of_scale_batch_size(local_trainer):
    with pytest.raises(ConfigurationError, match="was given a loader"):
        local_trainer().scale_batch_size(Learner(), learnable())
    with pytest.raises(ConfigurationError, match=r"Sized nor Learner has no 'size'"):
        local_trainer().scale_batch_size(Learner(), Sized(), batch_arg_name="size")
    with pytest.raises(ConfigurationError, match="steps_per_trial"):
        local_trainer().scale_batch_size(Learner(), Sized(), steps_per_trial=0)


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_control_c_ends_a_search_and_the_fit_behind_it(finder, local_trainer):
    class Pressed(Learner):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(batch, batch_idx)

    class Sized(DataModule):
        def __init__(self):
            super().__init__()
            self.batch_size = 4

        def train_dataloader(self):
            return learnable(batch_size=self.batch_size)

    trainer, module = local_trainer(max_epochs=2, callbacks=[finder()]), Pressed()

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(module, datamodule=Sized())
    assert trainer.global_step == 0 and not module.used


class Seldom(Tiny):
    """Makes a step every so many batches."""

    def __init__(self, every):
        super().__init__()
        self.automatic_optimization, self.every, self.batches = False, every, 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        loss = self.loss(batch)
        self.manual_backward(loss)
        if self.every and self.batches % self.every == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss


@pytest.mark.parametrize("every", [1, 7])
def test_rates_rise_from_step_to_step(every, local_trainer):
    torch.manual_seed(0)
    found = local_trainer().lr_find(Seldom(every), data(), num_training=10, early_stop_threshold=None)
    assert len(set(found.results["lr"])) == 10


def test_a_module_that_makes_no_step_ends(local_trainer):
    torch.manual_seed(0)
    with pytest.raises(ConfigurationError, match=r"Seldom has made no optimizer step in 100 batches"):
        local_trainer().lr_find(Seldom(0), data(), early_stop_threshold=None)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_module_that_has_run_once(local_trainer):
    """A forward pass leaves tensors with a graph in some, which deepcopy refuses."""

    class Normed(Tiny):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.utils.weight_norm(self.layer)
            self.kept = {}

        def forward(self, x):
            self.kept["latest"] = super().forward(x)
            return self.kept["latest"]

    module = Normed()
    module.lock, module.numbers = threading.Lock(), iter(range(3))  # which deepcopy refuses too
    module(torch.ones(1, 4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert len(local_trainer().lr_find(module, data(), num_training=5).results["lr"]) == 5
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert module.kept["latest"].requires_grad and not module.layer.weight.is_leaf
    assert module.layer.weight.grad_fn is not None
