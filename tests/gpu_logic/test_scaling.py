"""fp16 mixed precision with a GradScaler, whose logic is the same on CPUs."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import Tiny, data, weights

from raytrainer.errors import ConfigurationError
from raytrainer.worker.precision import Precision, ScaledOptimizer

CPU = torch.device("cpu")


def make(fused: bool = False, kind=torch.optim.AdamW):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1)
    options = {"fused": fused} if kind is torch.optim.AdamW else {}
    return layer, kind(layer.parameters(), lr=0.1, **options), Precision("16-mixed", CPU)


def backward(layer, precision, factor: float = 1.0):
    precision.scale((layer(torch.ones(2, 4)) * factor).sum()).backward()


@pytest.mark.parametrize("fused", [False, True])
def test_infinite_steps_are_left_out_and_counted(fused):
    layer, optimizer, precision = make(fused)
    for factor, skipped in [(1.0, False), (float("inf"), True), (1.0, False), (float("nan"), True)]:
        optimizer.zero_grad()
        before = weights(layer)
        backward(layer, precision, factor)
        precision.unscale(optimizer)
        precision.step(optimizer)
        assert torch.equal(before, weights(layer)) is skipped
        assert precision.skipped is skipped
        assert precision.skipped is skipped, "asking twice changes nothing"
    assert precision.skipped_steps == 2
    assert weights(layer).isfinite().all()


def test_fused_steps_are_counted_together():
    layer, optimizer, precision = make(fused=True)
    for factor in (float("inf"), 1.0, float("inf"), float("inf"), 1.0):
        optimizer.zero_grad()
        backward(layer, precision, factor)
        precision.step(optimizer)
    assert len(precision._unread) == 5  # nothing was fetched
    assert precision.skipped_steps == 3 and not precision.skipped


def test_equals_a_loop_by_hand():
    layer, optimizer, precision = make()
    ours, theirs = layer, copy.deepcopy(layer)
    by_hand = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(6):
        factor = float("inf") if step == 2 else 1.0
        optimizer.zero_grad()
        backward(ours, precision, factor)
        precision.unscale(optimizer)
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.5)
        precision.step(optimizer)
        by_hand.zero_grad()
        scaler.scale((theirs(torch.ones(2, 4)) * factor).sum()).backward()
        scaler.unscale_(by_hand)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        scaler.step(by_hand)
        scaler.update()
    assert torch.equal(weights(ours), weights(theirs))
    assert precision.state_dict() == {**scaler.state_dict(), "skipped_steps": 1}


def test_a_step_without_gradients_is_an_ordinary_one():
    _, optimizer, precision = make()
    precision.unscale(optimizer)
    precision.step(optimizer)
    assert not precision.skipped and precision.skipped_steps == 0


def test_unscaled_gradients_that_are_not_used_disturb_nothing():
    layer, optimizer, precision = make()
    backward(layer, precision)
    precision.unscale(optimizer)
    precision.unscale(optimizer)
    true = layer.weight.grad.clone()
    assert torch.equal(true, torch.full((1, 4), 2.0))
    optimizer.zero_grad()
    backward(layer, precision)
    precision.unscale(optimizer)
    assert torch.equal(true, layer.weight.grad)


def test_state_travels():
    layer, optimizer, precision = make()
    backward(layer, precision, float("inf"))
    precision.step(optimizer)
    other = Precision("16-mixed", CPU)
    other.load_state_dict(precision.state_dict())
    assert other.skipped_steps == 1 and other.state_dict() == precision.state_dict()
    assert other.state_dict()["scale"] == 2.0**15


def test_stand_in_is_the_optimizer_but_for_its_step():
    layer, optimizer, precision = make()
    seen = []
    given = ScaledOptimizer(
        optimizer, precision, lambda o: seen.append(layer.weight.grad.clone()), lambda: seen.append(1)
    )
    assert isinstance(given, torch.optim.AdamW) and given.param_groups is optimizer.param_groups
    given.param_groups[0]["lr"] = 0.5
    given.note = 7
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.note == 7
    before = weights(layer)

    def closure():
        given.zero_grad()
        backward(layer, precision)
        return "loss"

    assert given.step(closure) == "loss"
    assert torch.equal(seen[0], torch.full((1, 4), 2.0)) and seen[1] == 1
    assert not torch.equal(before, weights(layer))


# ---------------------------------------------------------------- whole runs


class Bursting(Tiny):
    """Its loss is infinite in some batches; a scheduler halves the learning rate each step."""

    bursts = (1, 3)

    def __init__(self, **optimizer) -> None:
        super().__init__()
        self.options = optimizer
        self.rates: list[float] = []
        self.grads: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch) / 100  # small enough for the first scale
        return loss * float("inf") if batch_idx in self.bursts else loss

    def on_before_optimizer_step(self, optimizer):
        self.grads.append(self.layer.weight.grad.norm().item())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"] * 2**6)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=2**-6, **self.options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("fused", [False, True])
def test_scheduler_rests_when_a_step_is_left_out(local_trainer, fused):
    module = Bursting(fused=fused)
    trainer = local_trainer(max_epochs=1, limit_train_batches=5, precision=16, gradient_clip_val=0.1)
    trainer.fit(module, data())
    assert module.rates == [0.5, 0.5, 0.25, 0.25, 0.125]
    assert (trainer.global_step, trainer.skipped_steps) == (5, 2)
    assert weights(module).isfinite().all()
    assert all(grad < 100 for index, grad in enumerate(module.grads) if index not in module.bursts)


def test_scheduler_frequency_counts_true_steps(local_trainer):
    class EverySecond(Bursting):
        def configure_optimizers(self):
            answer = super().configure_optimizers()
            answer["lr_scheduler"]["frequency"] = 2
            return answer

    module = EverySecond()
    local_trainer(max_epochs=1, limit_train_batches=6, precision=16).fit(module, data())
    assert module.rates == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25]


def test_own_optimizer_step(local_trainer):
    class Own(Bursting):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            assert isinstance(optimizer, torch.optim.AdamW)
            optimizer.step(closure=optimizer_closure)

    plain, own = Bursting(), Own()
    own.load_state_dict(plain.state_dict())
    for module in (plain, own):
        trainer = local_trainer(max_epochs=1, precision=16, gradient_clip_val=0.5)
        trainer.fit(module, data())
        assert trainer.skipped_steps == 2
    assert torch.equal(weights(plain), weights(own)) and plain.rates == own.rates


def test_own_optimizer_step_that_does_not_always_step(local_trainer):
    class Sometimes(Bursting):
        bursts = ()

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer_closure()
            if batch_idx % 2:
                optimizer.step()

    module = Sometimes()
    local_trainer(max_epochs=1, precision=16).fit(module, data())
    assert weights(module).isfinite().all() and max(module.grads) < 100


class Manual(Bursting):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 0.5)
        optimizer.step()
        self.lr_schedulers().step()


class Twin(Bursting):
    """What `Manual` does, automatically."""

    def on_before_optimizer_step(self, optimizer):
        pass

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()


def test_manual_optimization(local_trainer):
    Manual.bursts = Twin.bursts = ()
    manual, twin = Manual(), Twin()
    manual.load_state_dict(twin.state_dict())
    local_trainer(max_epochs=1, precision=16).fit(manual, data())
    local_trainer(max_epochs=1, precision=16, gradient_clip_val=0.5).fit(twin, data())
    assert torch.equal(weights(manual), weights(twin))
    Manual.bursts = (1, 3)
    trainer = local_trainer(max_epochs=1, precision=16)
    trainer.fit(module := Manual(), data())
    assert (trainer.global_step, trainer.skipped_steps) == (10, 2) and weights(module).isfinite().all()


def test_two_optimizers_by_hand(local_trainer):
    class Two(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.second = torch.nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(self.loss(batch) / 100)
            self.manual_backward(torch.nn.functional.mse_loss(self.second(batch[0]), batch[1]) / 100)
            first.step()
            second.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.layer, self.second)]

    module = Two()
    trainer = local_trainer(max_epochs=1, precision=16)
    trainer.fit(module, data())
    assert trainer.global_step == 20 and weights(module).isfinite().all()


def test_skipping_a_batch(local_trainer):
    class Skipping(Bursting):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            pass

    trainer = local_trainer(max_epochs=1, precision=16)
    trainer.fit(Skipping(), data())
    assert trainer.skipped_steps == 2


def test_accumulating(local_trainer):
    Bursting.bursts, before = (), Bursting.bursts
    try:
        module = Bursting()
        trainer = local_trainer(max_epochs=1, precision=16, accumulate_grad_batches=3, gradient_clip_val=1.0)
        trainer.fit(module, data())
        assert trainer.global_step == 4 and max(module.grads) < 100
    finally:
        Bursting.bursts = before


def test_resumes_with_scale_and_count(local_trainer, tmp_path):
    trainer = local_trainer(max_epochs=1, precision=16)
    whole = Bursting()
    start = copy.deepcopy(whole)
    local_trainer(max_epochs=2, precision=16, seed=3).fit(whole, data())
    first = copy.deepcopy(start)
    trainer = local_trainer(max_epochs=1, precision=16, seed=3, enable_checkpointing=True)
    trainer.fit(first, data())
    trainer = local_trainer(max_epochs=2, precision=16, seed=3)
    trainer.fit(start, data(), ckpt_path=str(next(tmp_path.rglob("*.ckpt"))))
    assert trainer.skipped_steps == 4
    assert torch.equal(weights(start), weights(whole))


def test_lbfgs_is_refused(local_trainer):
    class Closing(Tiny):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ConfigurationError, match=r"LBFGS.*bf16-mixed"):
        local_trainer(max_epochs=1, precision=16).fit(Closing(), data())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("16-true", torch.float16), ("bf16-true", torch.bfloat16), (64, torch.float64)]
)
def test_true_precision_keeps_integers_and_complex_numbers(precision, dtype):
    from raytrainer.plan import argument_checks as checks

    module = Tiny()
    module.register_buffer("count", torch.arange(3))
    module.register_buffer("phase", torch.ones(2, dtype=torch.complex64) * 1j)
    Precision(checks.precision("precision", precision), CPU).convert_module(module)
    assert module.dtype == dtype and module.count.dtype == torch.int64
    assert torch.equal(module.phase, torch.ones(2, dtype=torch.complex64) * 1j)
