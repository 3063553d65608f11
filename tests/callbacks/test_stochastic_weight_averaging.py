"""As torch's own recipe has it."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from exact import Died, Exact, run, same
from tiny import Tiny, data, weights
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from raytrainer import Callback, ConfigurationError, Logger, ModelCheckpoint, StochasticWeightAveraging


class Normed(Tiny):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.rates = []

    def forward(self, x):
        return self.layer(self.norm(x[0] if isinstance(x, (list, tuple)) else x))

    def on_train_epoch_end(self):
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def recipe(module, epochs, start, lr, annealing, strategy):
    (optimizer,), (scheduler,) = module.configure_optimizers()
    average, late, rates = AveragedModel(module), None, []
    for epoch in range(epochs):
        if epoch == start:
            late = SWALR(optimizer, lr, annealing, strategy)
        for batch in data():
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
        if late is not None:
            average.update_parameters(module)
        (late or scheduler).step()
        rates.append(optimizer.param_groups[0]["lr"])
    update_bn(data(), average)
    return average.module, rates


def twins():
    torch.manual_seed(4)
    first = Normed()
    torch.manual_seed(4)
    return first, Normed()


@pytest.mark.parametrize("start,first,annealing,strategy", [(0.5, 3, 2, "cos"), (2, 2, 10, "linear"), (0, 0, 0, "cos")])
def test_torchs_recipe(start, first, annealing, strategy, local_trainer):
    ours, by_hand = twins()
    callback = StochasticWeightAveraging(0.02, start, annealing, strategy)
    trainer = local_trainer(max_epochs=6, callbacks=callback)
    trainer.fit(ours, data(), data(4))
    expected, rates = recipe(by_hand, 6, first, 0.02, annealing, strategy)
    assert ours.rates == pytest.approx(rates)
    torch.testing.assert_close(weights(ours), weights(expected))
    torch.testing.assert_close(ours.norm.running_mean, expected.norm.running_mean)
    torch.testing.assert_close(ours.norm.running_var, expected.norm.running_var)
    assert ours.norm.momentum == 0.1 and trainer.global_step == 60
    assert len([e for e in ours.events if e == "t"]) == 70  # the last ten for the statistics


def test_another_average(local_trainer):
    """The last epoch's weights weigh as much as all before them."""
    ends = []

    class Ends(Tiny):
        def on_train_epoch_end(self):
            ends.append(weights(self))

    module = Ends()
    callback = StochasticWeightAveraging(
        0.02, 1, avg_fn=lambda average, value, count: (average + value) / 2, device="cpu"
    )
    local_trainer(max_epochs=4, callbacks=callback).fit(module, data())
    torch.testing.assert_close(weights(module), ends[1] / 4 + ends[2] / 4 + ends[3] / 2)


class Sixth(Exact):
    """Plain enough to have its schedulers taken from it."""


@pytest.mark.parametrize("batches", [8, 22, 29, 41])
def test_exact_resume(batches, tmp_path):
    """Before it begins, in the epoch in which it does, and with one and two epochs averaged."""

    def callbacks():
        saving = ModelCheckpoint(tmp_path / "c", save_top_k=0, save_last=True, every_n_train_steps=1)
        return [StochasticWeightAveraging(0.004, 1, 2), saving]

    calm = Sixth()
    run(calm, tmp_path, callbacks=[StochasticWeightAveraging(0.004, 1, 2)])
    with pytest.raises(Died):
        run(Sixth((0, batches), flag=f"{tmp_path}/flag"), tmp_path, callbacks=callbacks())
    module = Sixth()
    run(module, tmp_path, callbacks=callbacks(), ckpt_path="last")
    assert same(module, calm)


def test_training_that_ends_before(local_trainer, caplog, monkeypatch):
    monkeypatch.setattr(__import__("logging").getLogger("raytrainer"), "propagate", True)
    one, other = twins()
    local_trainer(max_epochs=2, callbacks=StochasticWeightAveraging(0.1, 5)).fit(one, data())
    local_trainer(max_epochs=2).fit(other, data())
    assert torch.equal(weights(one), weights(other))
    assert "before epoch 5" in caplog.text


def test_mistakes(local_trainer):
    for arguments, text in [
        ({"swa_lrs": -1.0}, "swa_lrs"),
        ({"swa_lrs": 0.1, "swa_epoch_start": -2}, "swa_epoch_start"),
        ({"swa_lrs": 0.1, "annealing_strategy": "exp"}, "annealing_strategy"),
    ]:
        with pytest.raises(ConfigurationError, match=text):
            StochasticWeightAveraging(**arguments)
    with pytest.raises(ConfigurationError, match="max_epochs"):
        local_trainer(max_steps=3, callbacks=StochasticWeightAveraging(0.1)).fit(Normed(), data())
    with pytest.raises(ConfigurationError, match=r"\[0.1, 0.2\]"):
        local_trainer(max_epochs=1, callbacks=StochasticWeightAveraging([0.1, 0.2], 0)).fit(Normed(), data())


class Manual(Normed):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


def test_manual_optimization_with_norms_is_refused_before_training(local_trainer):
    module = Manual()
    with pytest.raises(ConfigurationError, match=r"manual optimization and batch normalisation \(norm\)"):
        local_trainer(max_epochs=2, callbacks=StochasticWeightAveraging(0.1, 0)).fit(module, data())
    assert "t" not in module.events
    module = Manual()
    module.norm = torch.nn.LayerNorm(4)
    before = weights(module)
    local_trainer(max_epochs=2, callbacks=StochasticWeightAveraging(0.1, 0)).fit(module, data())
    assert module.events.count("t") == 20 and not torch.equal(weights(module), before)


class Interrupts(Callback):
    """Presses Ctrl-C in the given epoch, once."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_chunk_end(self, trainer, module, report):
        if trainer.current_epoch == self.epoch:
            self.epoch = None
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_ends_without_another_epoch(local_trainer, caplog, monkeypatch):
    monkeypatch.setattr(__import__("logging").getLogger("raytrainer"), "propagate", True)
    module = Normed()
    trainer = local_trainer(max_epochs=9, callbacks=[StochasticWeightAveraging(0.1, 0), Interrupts(1)])
    trainer.fit(module, data())
    assert trainer.interrupted and module.events.count("t") == trainer.global_step
    assert int(module.norm.num_batches_tracked) == trainer.global_step  # those of training, not begun anew
    assert "run was interrupted, so the statistics" in caplog.text


class Long:
    """Nobody knows how long, and no epoch comes to its end."""

    def __iter__(self):
        for _ in range(20):
            yield from data()


def test_statistics_come_from_no_more_than_an_epoch(local_trainer):
    class Stops(Normed):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 7 else None

    module = Stops()
    local_trainer(max_epochs=2, callbacks=StochasticWeightAveraging(0.1, 0)).fit(module, Long())
    assert module.events.count("t") == 14 + 7 and int(module.norm.num_batches_tracked) == 7


def test_the_pass_for_statistics_logs_nothing(local_trainer):
    class Texts(Logger):
        def __init__(self):
            self.texts = []

        def log_metrics(self, metrics, step=None):
            pass

        log_hyperparams = log_metrics

        def log_text(self, key, text, step=None):
            self.texts.append(text)

    class Telling(Normed):
        def training_step(self, batch, batch_idx):
            self.logger.log_text("t", f"{self.current_epoch} {batch_idx}")
            return super().training_step(batch, batch_idx)

        def on_train_end(self):
            self.logger.log_text("t", "end")

    logger = Texts()
    local_trainer(max_epochs=2, logger=logger, callbacks=StochasticWeightAveraging(0.1, 0)).fit(Telling(), data())
    assert logger.texts == [f"{epoch} {batch}" for epoch in range(2) for batch in range(10)] + ["end"]
