"""Optimizers that evaluate the loss on their own account, with and without accumulation."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from tiny import Tiny, data, weights

import raytrainer
from raytrainer.errors import ConfigurationError
from raytrainer.worker.accumulation_window import Window
from raytrainer.worker.closures import Closure, takes_closure


class Own(torch.optim.SGD):
    """A class of somebody else's that inherits `step`."""


class Optional(torch.optim.SGD):
    """Evaluates as often as `times` says."""

    times = (1,)

    def step(self, closure=None):
        times, self.times = self.times[0], self.times[1:] or self.times
        for _ in range(times):
            with torch.enable_grad():
                closure()
        super().step()


class Passing(torch.optim.SGD):
    """Passes on what it is given, as many wrappers do."""

    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class PassingToLBFGS(torch.optim.LBFGS):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class WithoutClosure(torch.optim.SGD):
    def step(self):
        super().step()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (torch.optim.SGD, Closure.NEVER),
        (torch.optim.AdamW, Closure.NEVER),
        (Own, Closure.NEVER),
        (WithoutClosure, Closure.NEVER),
        (Optional, Closure.OPTIONAL),
        (Passing, Closure.OPTIONAL),
        (PassingToLBFGS, Closure.REQUIRED),
        (torch.optim.LBFGS, Closure.REQUIRED),
    ],
)
def test_who_gets_a_closure(kind, expected):
    assert takes_closure(kind([torch.zeros(1)], lr=0.1)) is expected


class Net(Tiny):
    """Notes the gradient of each evaluation."""

    make = staticmethod(lambda parameters: torch.optim.LBFGS(parameters, lr=1e-6, max_iter=4, tolerance_change=0))

    def __init__(self):
        super().__init__()
        self.double()
        self.norms, self.logged = [], []

    def training_step(self, batch, batch_idx):
        loss = self.loss([part.double() for part in batch])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(self.layer.weight.grad.norm().item())

    def configure_optimizers(self):
        return self.make(self.parameters())


@pytest.mark.parametrize(("passing", "plain"), [(Passing, torch.optim.SGD), (PassingToLBFGS, torch.optim.LBFGS)])
def test_a_step_that_passes_on_its_arguments(passing, plain, local_trainer):
    found = []
    for kind in (passing, plain):
        torch.manual_seed(0)
        module = Net()
        module.make = lambda parameters, kind=kind: kind(parameters, lr=0.1)
        trainer = local_trainer(max_epochs=2, accumulate_grad_batches=2)
        trainer.fit(module, data())
        found.append(module.layer.weight.detach())
    assert trainer.global_step == 10 and torch.equal(*found)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_each_evaluation_is_of_the_whole_window(accumulate, local_trainer):
    """With a tiny step, all evaluations of a step find (nearly) the gradient of its window."""
    module = Net()
    alone = copy.deepcopy(module)
    local_trainer(max_epochs=1, accumulate_grad_batches=accumulate).fit(module, data(6 * 2))
    batches = list(data(6 * 2))
    expected = []
    for first in range(0, 6, accumulate):
        alone.zero_grad()
        for batch in batches[first : first + accumulate]:
            (alone.loss([part.double() for part in batch]) / accumulate).backward()
        expected += [alone.layer.weight.grad.norm().item()] * 4
    assert module.norms == pytest.approx(expected, rel=1e-3)
    assert module.norms != expected  # they are evaluations, at different weights


def test_accumulating_lbfgs_minimises_what_it_accumulates(local_trainer):
    """Its steps are those of batches as large as its window."""

    class Searches(Net):
        make = staticmethod(lambda parameters: torch.optim.LBFGS(parameters, max_iter=8, line_search_fn="strong_wolfe"))

    one = Searches()
    two = copy.deepcopy(one)
    local_trainer(max_epochs=3, accumulate_grad_batches=4).fit(one, data(16))
    local_trainer(max_epochs=3).fit(two, data(16, batch_size=8))
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-6, atol=1e-8)


def test_an_own_optimizer_step_may_evaluate_twice(local_trainer):
    class Sharp(Net):
        make = staticmethod(lambda parameters: torch.optim.SGD(parameters, lr=0.2))

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            self.logged.append(float(optimizer_closure()))
            with torch.no_grad():
                moved = [0.3 * p.grad for p in self.parameters()]
                torch._foreach_add_(list(self.parameters()), moved)
            optimizer.zero_grad()
            self.logged.append(float(optimizer_closure()))
            with torch.no_grad():
                torch._foreach_sub_(list(self.parameters()), moved)
            optimizer.step()

    one = Sharp()
    two = copy.deepcopy(one)
    local_trainer(max_epochs=2, accumulate_grad_batches=4).fit(one, data(16))
    local_trainer(max_epochs=2).fit(two, data(16, batch_size=8))
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-9, atol=1e-12)
    assert one.logged == pytest.approx(two.logged)  # the window's loss rather than its last batch's
    assert one.logged[1] > one.logged[0]


def test_what_is_gone_through_again_is_not_logged_again(local_trainer):
    """An epoch value counts each batch's evaluations, where only the last one of a window has several."""
    module = Net()
    trainer = local_trainer(max_epochs=1, accumulate_grad_batches=2)
    trainer.fit(module, data(4))
    losses = [float(module.loss([part.double() for part in batch])) for batch in data(4)]
    expected = (losses[0] + 4 * losses[1]) / 5
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(expected, rel=1e-3)


def test_an_optimizer_that_changes_its_mind(local_trainer):
    """A window's batches are not kept for one that has evaluated once; should it do so twice, it is told how."""

    class Changes(Net):
        make = staticmethod(lambda parameters: Optional(parameters, lr=0.1))

    trainer = local_trainer(max_epochs=1, accumulate_grad_batches=2)
    module = Changes()
    module.make = lambda parameters: _timed(parameters, (1, 2))
    with pytest.raises(ConfigurationError, match="step\\(self, closure\\)"):
        trainer.fit(module, data(8))
    module.make = lambda parameters: _timed(parameters, (2, 1, 2))
    local_trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, data(12))
    module.make = lambda parameters: _timed(parameters, (1, 2))
    local_trainer(max_epochs=1).fit(module, data(8))


def _timed(parameters, times):
    optimizer = Optional(parameters, lr=0.1)
    optimizer.times = times
    return optimizer


@pytest.mark.parametrize("own_step", [True, False])
def test_batches_are_let_go(own_step, local_trainer):
    """After the first window, batches of an optimizer that evaluates once are not kept."""
    held, seen = [], []

    class Looks(Net):
        make = staticmethod(lambda parameters: Optional(parameters, lr=0.1))

    class LooksOwn(Looks):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer.step(closure=optimizer_closure)

    class Sees(raytrainer.WorkerCallback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            held.append(sum(reference() is not None for reference in seen))
            seen.append(weakref.ref(batch[0]))

    local_trainer(max_epochs=1, accumulate_grad_batches=3, callbacks=[Sees()]).fit(
        LooksOwn() if own_step else Looks(), data(12)
    )
    assert held == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("needs_number", [False, True])
def test_a_skipped_window_has_no_loss(needs_number, local_trainer):
    """But for an optimizer that computes with it, for which it is zero."""
    found = []

    class Skips(Net):
        if not needs_number:
            make = staticmethod(lambda parameters: torch.optim.SGD(parameters, lr=0.1))

        def training_step(self, batch, batch_idx):
            return None if batch_idx % 4 < 2 else super().training_step(batch, batch_idx)

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            found.append(optimizer_closure())

        def on_before_optimizer_step(self, optimizer):
            found.append(self.layer.weight.grad is None)

    local_trainer(max_epochs=1, accumulate_grad_batches=2).fit(Skips(), data(12))
    nothing = 0.0 if needs_number else None
    assert found[:3] == [True, nothing, False] and found[4:] == [True, nothing]
    assert isinstance(found[3], torch.Tensor) and not found[3].requires_grad


@pytest.mark.parametrize("own", [True, False])
def test_a_closure_that_is_never_called(own, local_trainer):
    """Nothing would train, without a word."""

    class Forgets(Net):
        make = staticmethod(lambda parameters: Optional(parameters, lr=0.1) if own else _timed(parameters, (0,)))

        if own:

            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
                pass

    with pytest.raises(ConfigurationError, match=r"not called in batch 0.*optimizer_closure\(\)"):
        local_trainer(max_epochs=1).fit(Forgets(), data(4))


class Decorated(torch.optim.SGD):
    """Its closure runs where gradients are off, and is given by name only."""

    @torch.no_grad()
    def step(self, *, closure=None):
        loss = None if closure is None else closure()
        super().step()
        return loss


@pytest.mark.parametrize("manual", [True, False])
def test_a_step_without_gradients(manual, local_trainer):
    class Steps(Net):
        make = staticmethod(lambda parameters: Decorated(parameters, lr=0.1))

        def training_step(self, batch, batch_idx):
            if self.automatic_optimization:
                return super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            assert optimizer.step(closure=lambda: 5.0) == 5.0
            return None

    module = Steps()
    module.automatic_optimization = not manual
    before = weights(module)
    local_trainer(max_epochs=1).fit(module, data(4))
    assert not torch.equal(before, weights(module))


def test_a_run_that_goes_on_within_a_window():
    """Its earlier batches are not there to be evaluated again; nothing silently adds up instead."""

    one = Window(None, None, several=True)
    one.add("batch 1", 1, None)  # batch 0 was before
    assert list(one.evaluate(2)) == []
    with pytest.raises(ConfigurationError, match="in the middle of a window"):
        one.evaluate(2)


def test_a_mapping_of_another_kind(local_trainer):
    from collections import UserDict

    seen = []

    class Maps(Net):
        def training_step(self, batch, batch_idx):
            return UserDict(loss=super().training_step(batch, batch_idx), note="here")

        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append((outputs["note"], outputs["loss"].requires_grad))

    local_trainer(max_epochs=1).fit(Maps(), data(4))
    assert seen == [("here", False)] * 2
