"""Training is what a hand-written loop over the same loader does, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny import Tiny, data, weights

from raytrainer import ConfigurationError
from raytrainer.worker.automatic_optimization import is_torchs


def hand_loop(module, loader, epochs=2, accumulate=1, clip=None, algorithm="norm", lr=0.1, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=lr)
    batches = list(loader)
    steps = 0
    for _ in range(epochs):
        for index, batch in enumerate(batches):
            if index % accumulate == 0:
                optimizer.zero_grad()
            loss = module.loss(batch)
            (loss / accumulate if accumulate > 1 else loss).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(batches):
                if clip is not None and algorithm == "norm":
                    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
                elif clip is not None:
                    torch.nn.utils.clip_grad_value_(module.parameters(), clip)
                optimizer.step()
                steps += 1
    return weights(module), steps


def twins(kind=Tiny):
    torch.manual_seed(3)
    first = kind()
    torch.manual_seed(3)
    return first, kind()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"accumulate": 3},
        {"accumulate": 4},
        {"accumulate": 100},
        {"clip": 0.05},
        {"clip": 0.01, "algorithm": "value"},
        {"clip": 0.05, "accumulate": 3},
        {"clip": 0.01, "accumulate": 3, "algorithm": "value"},
    ],
    ids=str,
)
@pytest.mark.parametrize("val_every", [None, 3])
def test_bit_for_bit(options, val_every, local_trainer):
    ours, by_hand = twins()
    trainer = local_trainer(
        max_epochs=2,
        accumulate_grad_batches=options.get("accumulate", 1),
        gradient_clip_val=options.get("clip"),
        gradient_clip_algorithm=options.get("algorithm"),
        val_check_interval=val_every,
    )
    trainer.fit(ours, data(), data(4))  # validation in the middle of an accumulation must not touch gradients
    expected, steps = hand_loop(by_hand, data(), **options)
    assert torch.equal(weights(ours), expected)
    assert trainer.global_step == steps


def test_clipping_happens_on_stepping_batches_only(local_trainer):
    class Counting(Tiny):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.events.append((gradient_clip_val, gradient_clip_algorithm))
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

        def on_before_optimizer_step(self, optimizer):
            self.norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])
            self.events.append("before")

    module = Counting()
    local_trainer(max_epochs=1, accumulate_grad_batches=4, gradient_clip_val=1e-3).fit(module, data())
    assert [e for e in module.events if e not in ("t", "|")] == ["before", (1e-3, "norm")] * 3
    assert module.norm > 1e-3  # not clipped yet


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lbfgs(accumulate, local_trainer):
    class Second(Tiny):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=3)

    ours, by_hand = twins(Second)
    trainer = local_trainer(max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(ours, data())
    assert trainer.global_step == 10 // accumulate
    if accumulate > 1:
        return
    optimizer = by_hand.configure_optimizers()
    for batch in data():

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = by_hand.loss(batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert torch.equal(weights(ours), weights(by_hand))


def test_own_optimizer_step(local_trainer):
    """The usual reason: a learning rate that warms up, with the closure passed on."""

    class Warming(Tiny):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.param_groups[0]["lr"] = self.lr * (self.trainer.global_step + 1) / 20
            self.events.append((epoch, batch_idx))
            optimizer.step(closure=optimizer_closure)

    ours, by_hand = twins(Warming)
    local_trainer(max_epochs=2).fit(ours, data())
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for step, batch in enumerate([*data(), *data()]):
        optimizer.param_groups[0]["lr"] = 0.1 * (step + 1) / 20
        optimizer.zero_grad()
        by_hand.loss(batch).backward()
        optimizer.step()
    assert torch.equal(weights(ours), weights(by_hand))
    assert [e for e in ours.events if isinstance(e, tuple)] == [(e, b) for e in range(2) for b in range(10)]


def test_own_zero_grad_and_backward(local_trainer):
    class Own(Tiny):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            self.events.append("zero")
            optimizer.zero_grad(set_to_none=False)

        def backward(self, loss, *args, **kwargs):
            self.events.append("backward")
            (2 * loss).backward()

    ours, by_hand = twins(Own)
    local_trainer(max_epochs=1).fit(ours, data())
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for batch in data():
        optimizer.zero_grad()
        (2 * by_hand.loss(batch)).backward()
        optimizer.step()
    assert torch.equal(weights(ours), weights(by_hand))
    assert ours.events.count("zero") == ours.events.count("backward") == 10


@pytest.mark.parametrize("whose", ["the class's", "a subclass's", "the instance's"])
def test_an_optimizer_with_a_zero_grad_of_its_own_is_asked(whose, local_trainer):
    class Asked(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            asked.append("class")
            super().zero_grad(set_to_none)

    class Late(Tiny):
        def configure_optimizers(self):
            kind = {"the class's": Asked, "a subclass's": type("Sub", (Asked,), {})}.get(whose, torch.optim.SGD)
            return kind(self.parameters(), lr=0.1)

        def on_train_start(self):
            if whose == "the instance's":  # as libraries do that wrap one
                optimizer = self.optimizers().optimizer
                own = optimizer.zero_grad
                optimizer.zero_grad = lambda *args: (asked.append("instance"), own(*args))[1]

    asked: list[str] = []
    ours, by_hand = twins(Tiny)
    late = Late()
    late.load_state_dict(ours.state_dict())
    local_trainer(max_epochs=1).fit(late, data())
    local_trainer(max_epochs=1).fit(by_hand, data())
    assert len(asked) == 10 and torch.equal(weights(late), weights(by_hand))


def test_a_zero_grad_that_others_have_put_in_torchs_place_is_asked(local_trainer, monkeypatch):
    """Before this package was imported, or after."""
    real, asked = torch.optim.Optimizer.zero_grad, []

    @functools.wraps(real)  # so that it has the name and the module of torch's
    def patched(self, *args, **kwargs):
        asked.append(self)
        return real(self, *args, **kwargs)

    assert is_torchs(real) and not is_torchs(patched) and not is_torchs(functools.partial(real))
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", patched)
    local_trainer(max_epochs=1).fit(Tiny(), data())
    assert len(asked) == 10


def test_a_profiler_of_the_users_own_sees_the_marks(local_trainer):
    class Profiled(Tiny):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                self.trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
                self.trace.start()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 4:
                self.trace.stop()
                self.marks = [each.count for each in self.trace.key_averages() if "zero_grad" in each.key]
                del self.trace

    module = Profiled()
    local_trainer(max_epochs=1).fit(module, data())
    assert module.marks == [3]


def test_parameters_that_come_later_lose_their_gradients_too(local_trainer):
    """Groups are looked at in each step, as `zero_grad` of torch does."""

    class Grows(Tiny):
        def __init__(self):
            super().__init__()
            self.late = torch.nn.Parameter(torch.ones(()))
            self.seen = []

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p is not self.late], lr=0.1)

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                self.optimizers().optimizer.add_param_group({"params": [self.late], "lr": 0.0})

        def training_step(self, batch, batch_idx):
            return self.loss(batch) + self.late

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.seen.append(self.late.grad.item())

    model = Grows()
    local_trainer(max_epochs=1, limit_train_batches=5).fit(model, data())
    assert model.seen == [1.0, 2.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_what_a_step_may_return(kind, local_trainer):
    class Returning(Tiny):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            return loss if kind == "tensor" else {"loss": loss, "extra": batch_idx}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert not outputs["loss"].requires_grad
            self.events.append(outputs.get("extra"))

    ours, by_hand = twins(Returning)
    local_trainer(max_epochs=2).fit(ours, data())
    assert torch.equal(weights(ours), hand_loop(by_hand, data())[0])
    assert [e for e in ours.events if e != "|"] == [i if kind == "dict" else None for i in range(10)] * 2


def test_none_skips_a_batch(local_trainer):
    class Skipping(Tiny):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else self.loss(batch)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert ("loss" in outputs) == (batch_idx % 2 == 0)

    ours, by_hand = twins(Skipping)
    local_trainer(max_epochs=1).fit(ours, data())
    assert torch.equal(weights(ours), hand_loop(by_hand, [b for i, b in enumerate(data()) if i % 2 == 0], epochs=1)[0])


@pytest.mark.parametrize("returned", [1.0, "loss", {"los": torch.zeros(())}, [torch.zeros(())], {"loss": 1.0}])
def test_what_a_step_must_not_return(returned, local_trainer):
    class Returning(Tiny):
        def training_step(self, batch, batch_idx):
            return returned

    with pytest.raises(ConfigurationError, match=r"training_step returned .*tensor.*None to skip"):
        local_trainer(max_epochs=1).fit(Returning(), data())


def test_no_optimizer_at_all(local_trainer):
    class Without(Tiny):
        def configure_optimizers(self):
            return None

    module = Without()
    before = weights(module)
    trainer = local_trainer(max_epochs=1)
    trainer.fit(module, data(), data(4))
    assert module.story == "s 10 v |" and torch.equal(weights(module), before)


def test_several_optimizers_need_manual_optimization(local_trainer):
    class Two(Tiny):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    with pytest.raises(ConfigurationError, match=r"2 optimizers.*automatic_optimization = False"):
        local_trainer(max_epochs=1).fit(Two(), data())


# ---------------------------------------------------------------- manual optimization


class Gan(Tiny):
    """Two parts that learn in turns from one batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = torch.nn.Linear(2, 1)
        self.hooks = []

    def configure_optimizers(self):
        return torch.optim.Adam(self.layer.parameters(), 0.01), torch.optim.SGD(self.critic.parameters(), 0.1)

    def losses(self, batch):
        x, y = batch
        return -self.critic(self.layer(x)).mean(), self.critic(self.layer(x).detach()).mean() - self.critic(y).mean()

    def training_step(self, batch, batch_idx):
        self.events.append("t")
        making, judging = self.optimizers()
        self.toggle_optimizer(making)
        assert all(p.requires_grad for p in self.layer.parameters())
        assert not any(p.requires_grad for p in self.critic.parameters())
        loss = self.losses(batch)[0]
        making.zero_grad()
        self.manual_backward(loss)
        assert all(p.grad is None for p in self.critic.parameters()) or batch_idx
        making.step()
        self.untoggle_optimizer(making)
        with self.toggled_optimizer(judging):
            loss = self.losses(batch)[1]
            judging.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(judging, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            judging.step()
        assert all(p.requires_grad for p in self.parameters())
        self.log("judged", loss)

    def on_before_optimizer_step(self, optimizer):
        self.hooks.append(type(optimizer).__name__)

    def on_before_backward(self, loss):
        self.hooks.append("backward")


def test_manual_optimization_with_two_optimizers(local_trainer):
    ours, by_hand = twins(Gan)
    trainer = local_trainer(max_epochs=2)
    trainer.fit(ours, data(), data(4))
    making, judging = by_hand.configure_optimizers()
    for batch in [*data(), *data()]:
        making.zero_grad()
        by_hand.losses(batch)[0].backward()
        making.step()
        judging.zero_grad()
        by_hand.losses(batch)[1].backward()
        torch.nn.utils.clip_grad_norm_(by_hand.critic.parameters(), 0.1)
        judging.step()
    assert torch.equal(weights(ours), weights(by_hand))
    assert trainer.global_step == 40  # steps are counted at the optimizers
    assert ours.hooks == ["backward", "Adam", "backward", "SGD"] * 20
    assert "judged" in trainer.callback_metrics


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}])
def test_what_manual_optimization_does_itself(options, local_trainer):
    with pytest.raises(ConfigurationError, match=r"manual optimization.*clip_gradients"):
        local_trainer(max_epochs=1, **options).fit(Gan(), data())


def test_manual_backward_in_automatic_optimization(local_trainer):
    class Mixed(Tiny):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))

    with pytest.raises(ConfigurationError, match=r"manual_backward\(\) with automatic.*return the loss"):
        local_trainer(max_epochs=1).fit(Mixed(), data())


def test_max_steps_in_manual_optimization(local_trainer):
    trainer = local_trainer(max_steps=6)
    trainer.fit(Gan(), data())
    assert trainer.global_step == 6


# ---------------------------------------------------------------- schedulers


def rates(scheduler_options, local_trainer, epochs=3, batches=4, make=None, **options):
    """The learning rate with which each batch is trained."""

    class Scheduled(Tiny):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            make_scheduler = make or (lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5))
            return [optimizer], [{"scheduler": make_scheduler(optimizer), **scheduler_options}]

        def training_step(self, batch, batch_idx):
            self.events.append(self.optimizers().param_groups[0]["lr"])
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

    module = Scheduled()
    local_trainer(max_epochs=epochs, limit_train_batches=batches, num_sanity_val_steps=0, **options).fit(
        module, data(), data(4)
    )
    return [e for e in module.events if isinstance(e, float)]


def halved(*times):
    return [0.5**n for n in times]


@pytest.mark.parametrize(
    ("scheduler", "options", "expected"),
    [
        ({}, {}, halved(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)),
        ({"interval": "epoch"}, {}, halved(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)),
        ({"interval": "epoch", "frequency": 2}, {}, halved(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1)),
        ({"interval": "step"}, {}, halved(*range(12))),
        ({"interval": "step", "frequency": 3}, {}, halved(0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)),
        # a step is an optimizer step
        ({"interval": "step"}, {"accumulate_grad_batches": 2}, halved(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)),
        ({"interval": "step"}, {"accumulate_grad_batches": 3}, halved(0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5)),
        ({"interval": "epoch"}, {"val_check_interval": 2}, halved(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)),
    ],
)
def test_when_schedulers_step(scheduler, options, expected, local_trainer):
    assert rates(scheduler, local_trainer, **options) == expected


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


@pytest.mark.parametrize(
    ("scheduler", "options", "expected"),
    [
        # the first value is the best; each later one is no better
        ({"monitor": "val_loss"}, {}, halved(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1)),
        ({"monitor": "val_loss", "frequency": 2}, {"epochs": 5}, halved(*[0] * 16, *[1] * 4)),
        ({"monitor": "val_loss", "interval": "step", "frequency": 2}, {"val_check_interval": 1},
         halved(0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4)),
        ({"monitor": "nothing", "strict": False}, {}, halved(*[0] * 12)),
    ],
)  # fmt: skip
def test_when_plateau_schedulers_step(scheduler, options, expected, local_trainer):
    assert rates(scheduler, local_trainer, make=plateau, **options) == expected


def test_strict_monitor_names_what_exists(local_trainer):
    with pytest.raises(
        ConfigurationError, match=r"ReduceLROnPlateau monitors 'los'.*there are: val_loss.*strict=False"
    ):
        rates({"monitor": "los"}, local_trainer, make=plateau)


def test_own_scheduler_step(local_trainer):
    seen = []

    class Own(Tiny):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [{"scheduler": plateau(optimizer), "monitor": "val_loss"}]

        def lr_scheduler_step(self, scheduler, metric):
            seen.append((type(scheduler).__name__, float(metric)))

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 2.5)

    local_trainer(max_epochs=2).fit(Own(), data(), data(4))
    assert seen == [("ReduceLROnPlateau", 2.5)] * 2


def test_schedulers_are_the_users_own_in_manual_optimization(local_trainer):
    class Own(Tiny):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

        def training_step(self, batch, batch_idx):
            self.events.append(self.optimizers().param_groups[0]["lr"])
            self.optimizers().step()
            if batch_idx == 4:
                self.lr_schedulers().step()

    module = Own()
    local_trainer(max_epochs=2).fit(module, data())
    assert [e for e in module.events if isinstance(e, float)] == halved(*[0] * 5, *[1] * 10, *[2] * 5)


def test_estimated_steps_serve_a_schedule(local_trainer):
    class OneCycle(Tiny):
        def configure_optimizers(self):
            self.estimate = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

        def train_dataloader(self):
            self.events.append("loaded")
            return data()

    for options, steps in (
        ({"max_epochs": 3}, 30),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 9),
        ({"max_steps": 7}, 7),
        ({"max_epochs": 2, "limit_train_batches": 5}, 10),
        ({"max_epochs": -1, "max_time": {"seconds": 0}}, float("inf")),
    ):
        module = OneCycle()
        local_trainer(**options).fit(module)
        assert module.estimate == steps
        assert module.events.count("loaded") <= 1


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("precision", "dtype"), [(64, torch.float64), ("bf16-true", torch.bfloat16), (32, torch.float32)]
)
def test_true_precision(precision, dtype, local_trainer):
    class Looking(Tiny):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(1))
            self.register_buffer("count", torch.zeros(1, dtype=torch.long))

        def training_step(self, batch, batch_idx):
            assert batch[0].dtype == self.layer.weight.dtype == self.scale.dtype == self.dtype == dtype
            assert self.count.dtype == torch.long
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            assert batch[0].dtype == dtype

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    module = Looking()
    trainer = local_trainer(max_epochs=1, precision=precision)
    trainer.fit(module, data(), data(4))
    assert {output.dtype for output in trainer.predict(module, data(4))} == {dtype}
    if precision == 64:
        _, by_hand = twins()
        torch.manual_seed(3)
        module = Tiny()
        local_trainer(max_epochs=2, precision=64).fit(module, data())
        expected, _ = hand_loop(by_hand.double(), [[t.double() for t in b] for b in data()])
        assert torch.equal(weights(module), expected)


def test_mixed_bf16(local_trainer):
    class Looking(Tiny):
        def training_step(self, batch, batch_idx):
            assert batch[0].dtype == torch.float32 and self(batch[0]).dtype == torch.bfloat16
            return self.loss((batch[0], batch[1].bfloat16())).float()

        def on_after_backward(self):
            assert self.layer.weight.grad.dtype == torch.float32

    module = Looking()
    local_trainer(max_epochs=1, precision="bf16").fit(module, data())
    assert module.dtype == torch.float32


def test_mixed_fp16(local_trainer):
    """Scaled gradients that overflow leave a step out; the others train."""

    class Looking(Tiny):
        def training_step(self, batch, batch_idx):
            assert self(batch[0]).dtype == torch.float16
            return self.loss((batch[0], batch[1].half())).float()

    module = Looking()
    before = weights(module)
    local_trainer(max_epochs=3, precision=16, gradient_clip_val=1.0).fit(module, data())
    assert torch.isfinite(weights(module)).all() and not torch.equal(weights(module), before)
