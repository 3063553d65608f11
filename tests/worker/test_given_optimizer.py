"""What `self.optimizers()` gives."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import Tiny, data, weights

from raytrainer.errors import ConfigurationError
from raytrainer.worker.given_optimizer import GivenOptimizer, inner_optimizer


def test_it_is_the_optimizer():
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    given = GivenOptimizer(optimizer)
    assert isinstance(given, torch.optim.SGD) and isinstance(given, torch.optim.Optimizer)
    assert given.optimizer is optimizer and inner_optimizer(given) is inner_optimizer(optimizer) is optimizer
    given.param_groups[0]["lr"] = 0.5
    given.note = 7
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.note == 7 and repr(given) == repr(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(given, 1)
    layer(torch.ones(1, 2)).sum().backward()
    before = layer.bias.clone()
    given.step()
    scheduler.step()
    assert not torch.equal(before, layer.bias) and optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert given.step(lambda: torch.tensor(3.0)) == 3.0
    assert type(copy.deepcopy(given)) is torch.optim.SGD


class Two(Tiny):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Linear(4, 2)
        self.seen = []

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        assert first.optimizer is self.optimizers(use_pl_optimizer=False)[0] is self.trainer.optimizers[0]
        with first.toggle_model():
            self.seen.append([p.requires_grad for p in self.parameters()])
            loss = (self.layer(batch[0]) + self.other(batch[0])).square().mean()
            first.zero_grad()
            self.manual_backward(loss)
            first.step()
        self.seen.append([p.requires_grad for p in self.parameters()])
        with second.toggle_model(sync_grad=batch_idx % 2 == 1):
            self.manual_backward(self.other(batch[0]).square().mean())
            if batch_idx % 2:
                second.step()
                second.zero_grad()

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), 0.1), torch.optim.SGD(self.other.parameters(), 0.1)


def test_toggling(local_trainer):
    module = Two()
    before = weights(module)
    trainer = local_trainer(max_epochs=1)
    trainer.fit(module, data(8))
    assert module.seen == [[True, True, False, False], [True] * 4] * 4
    assert trainer.global_step == 6
    assert not torch.equal(before, weights(module))


def test_automatic_optimization_has_it_too(local_trainer):
    class Looks(Tiny):
        def on_train_start(self):
            optimizer = self.optimizers()
            assert optimizer.optimizer is self.trainer.optimizers[0]
            with optimizer.toggle_model():
                assert all(p.requires_grad for p in self.parameters())

    local_trainer(max_epochs=1).fit(Looks(), data(4))


# ---------------------------------------------------------------- clipping by hand


class Clips(Tiny):
    def __init__(self, *given):
        super().__init__()
        self.given, self.norms = given, []

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, *self.given)
        self.norms.append(float(torch.stack([p.grad.norm() for p in self.parameters()]).norm()))


@pytest.mark.parametrize("given", [(), (1e-3,), (1e-3, "norm"), (None, "norm")])
def test_without_values_they_are_the_trainers(given, local_trainer):
    module = Clips(*given)
    local_trainer(max_epochs=1, gradient_clip_val=1e-3).fit(module, data(4))
    assert module.norms == pytest.approx([1e-3] * 2, rel=1e-2)


@pytest.mark.parametrize("given", [(0.5,), (1e-3, "value")])
def test_other_values_than_the_trainers_are_refused(given, local_trainer):
    with pytest.raises(ConfigurationError, match="give them in one place"):
        local_trainer(max_epochs=1, gradient_clip_val=1e-3).fit(Clips(*given), data(4))


def test_own_values_without_the_trainers(local_trainer):
    module = Clips(1e-3)
    local_trainer(max_epochs=1).fit(module, data(4))
    assert module.norms == pytest.approx([1e-3] * 2, rel=1e-2)


class ByHand(Tiny):
    """A plateau scheduler without a monitor, stepped in `training_step`."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.rates = []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        self.log("loss", 1.0)
        self.lr_schedulers().step(1.0)
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return [optimizer], [{"scheduler": plateau, "monitor": "loss"} if self.monitors else plateau]


@pytest.mark.parametrize("monitors", [True, False])
def test_a_plateau_scheduler_that_is_stepped_by_hand(monitors, local_trainer):
    module = ByHand()
    module.monitors = monitors
    local_trainer(max_epochs=2).fit(module, data(4))
    assert module.rates == [0.1, 0.05, 0.025, 0.0125]  # by nobody else, at no epoch's end


@pytest.mark.parametrize("manual", [False, True])
def test_every_hook_of_a_fit_is_given_it(manual, local_trainer):
    """Also those before training: an optimizer with modes of its own is switched around the sanity check too."""
    seen = []

    class Hooks(Tiny):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if manual else loss

        def look(self, *args):
            seen.append(self.optimizers().optimizer is self.trainer.optimizers[0])

        on_fit_start = on_validation_start = on_train_start = on_train_epoch_start = on_train_end = on_fit_end = look

    local_trainer(max_epochs=1, num_sanity_val_steps=1).fit(Hooks(), data(), data(4))
    assert seen == [True] * 7


class Wraps(torch.optim.Optimizer):
    """As opacus's: an optimizer that never called `Optimizer.__init__`, and has not torch's hooks."""

    def __init__(self, inner):
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.inner.step(closure)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


class Wrapping(Tiny):
    def __init__(self, automatic, wraps=True):
        super().__init__()
        self.automatic_optimization, self.wraps = automatic, wraps

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        return None

    def configure_optimizers(self):
        inner = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return Wraps(inner) if self.wraps else inner


@pytest.mark.parametrize("automatic", [True, False])
def test_one_that_wraps_another(automatic, local_trainer):
    torch.manual_seed(1)
    module = Wrapping(automatic)
    plain = copy.deepcopy(module)
    plain.wraps = False
    trainer = local_trainer(max_epochs=2)
    trainer.fit(module, data())
    local_trainer(max_epochs=2).fit(plain, data())
    assert trainer.global_step == 20 and torch.equal(weights(module), weights(plain))
