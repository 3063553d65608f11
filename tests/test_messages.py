"""What is said to mistakes: what was received, what is allowed, what to do."""

from __future__ import annotations

import logging
import types

import pytest
import torch
from tiny import Tiny, data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raytrainer
from raytrainer.driver.cluster import session
from raytrainer.errors import ConfigurationError
from raytrainer.gpu import choice


def loader() -> DataLoader:
    x = torch.randn(8, 4)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4)


class Net(raytrainer.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Bare(Net):
    def __init__(self) -> None:
        self.lr = 0.1


class Early(Net):
    def __init__(self) -> None:
        super().__init__()
        self.limit = self.trainer.max_epochs


class Named(Net):
    def configure_optimizers(self):
        return "adam"


def of_lightning() -> object:
    """An object whose class derives from what Lightning calls its module."""
    base = types.new_class("LightningModule", (nn.Module,), exec_body=lambda body: body.update(
        __module__="lightning.pytorch.core.module"
    ))  # fmt: skip
    return type("Old", (base,), {"training_step": lambda self, batch, batch_idx: None})()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Net, r"model=Net, a class: give an object of it, such as Net\(\)"),
        (lambda: nn.Linear(2, 2), "model=Linear, an nn.Module that does not say how it is trained"),
        (lambda: 3, "model=int: give a raytrainer.Module"),
        (of_lightning, "model=Old is a LightningModule of Lightning's: derive it from raytrainer.Module"),
        (Bare, r"Bare.__init__ does not call super\(\).__init__\(\)"),
        (Named, "configure_optimizers returned 'adam'"),
    ],
)
def test_models(local_trainer, make, message):
    with pytest.raises(ConfigurationError, match=message):
        local_trainer(max_epochs=1).fit(make(), loader())


def test_backward_in_a_step(local_trainer):
    class Twice(Tiny):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            loss.backward()
            return loss

    with pytest.raises(RuntimeError, match="a second time") as caught:
        local_trainer(max_epochs=1).fit(Twice(), data())
    assert any("The Trainer calls backward() on the loss" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("kind", [Tiny, raytrainer.DataModule])
def test_what_makes_a_new_object_is_the_classes(kind):
    with pytest.raises(ConfigurationError, match=rf"leaves this one as it is: write new = {kind.__name__}\.load_from"):
        kind().load_from_checkpoint("last.ckpt")


def test_a_trainer_in_init():
    with pytest.raises(RuntimeError, match="goes into setup"):
        Early()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logger": "tensorboard"}, "logger='tensorboard': give a Logger"),
        ({"callbacks": "early"}, "callback 'early': give"),
        ({"callbacks": [raytrainer.Timer]}, r"callback Timer, a class: give an object, Timer\("),
        (
            {"strategy": "ddpp"},
            r"strategy='ddpp': give one of 'auto', .*Or an object: DDP.*\. Did you mean 'ddp'\?",
        ),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ConfigurationError, match=message):
        raytrainer.Trainer(**options)


def test_half_a_validation(local_trainer, caplog):
    class Steps(Net):
        def validation_step(self, batch, batch_idx):
            self.log("v", 1.0)

    def told(module, *loaders):
        caplog.clear()
        local_trainer(max_epochs=1).fit(module, *loaders)
        return [(r.levelname, r.getMessage()) for r in caplog.records if "nothing is validated" in r.getMessage()]

    with caplog.at_level(logging.INFO, "raytrainer"):
        assert told(Net(), loader(), loader()) == [
            ("WARNING", "There is data for validation, but Net has no validation_step: nothing is validated.")
        ]
        assert told(Steps(), loader()) == [
            ("INFO", "Steps has a validation_step, but no validation loader was given: nothing is validated.")
        ]
        assert told(Steps(), loader(), loader()) == told(Net(), loader()) == []


def test_a_default_prediction_says_what_it_called(local_trainer):
    with pytest.raises(TypeError) as caught:
        local_trainer().predict(Net(), loader())
    assert (
        "Net has no predict_step, so each batch is predicted by self(batch), and here a batch is a list of 2"
        in (caught.value.__notes__[0])
    )


def test_no_gpu_here(monkeypatch):
    """Told before a Ray is started for them."""
    monkeypatch.setattr(session, "open_nvml", lambda: None)
    monkeypatch.setattr(session, "_running_here", lambda: None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # by an earlier test
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigurationError, match=r"gpus=2: this machine has no NVIDIA GPU .*num_processes=2"):
        raytrainer.Trainer(gpus=2, logger=False, enable_checkpointing=False).fit(Net(), loader())


def test_a_torch_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ConfigurationError, match=r"torch .* is built without CUDA"):
        choice.require_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    choice.require_cuda()


def test_more_workers_than_cpus(monkeypatch, caplog):
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(session.inherited, "remember", lambda *_, **__: None)
    monkeypatch.setattr(session.os, "cpu_count", lambda: 2)
    for name in ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_worker_niceness"):
        monkeypatch.setenv(name, "0")
    with caplog.at_level(logging.INFO, "raytrainer"):
        session._start(16, None, None)
        session._start(1, None, None)
    assert [record.getMessage() for record in caplog.records] == [
        "16 workers share the 2 CPU(s) of this machine: more workers than CPUs train slower.",
        "Starting Ray on this machine, with 17 CPUs: one for each worker, and one for data; the machine has 2.",
        "Starting Ray on this machine, with 2 CPUs.",
    ]
