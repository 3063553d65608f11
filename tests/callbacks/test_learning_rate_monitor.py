from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Tiny, data
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from raytrainer import DeviceStatsMonitor, ThroughputMonitor
from raytrainer.callbacks.learning_rate_monitor import LearningRateMonitor, group_names
from raytrainer.errors import ConfigurationError


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1))


def scheduled(optimizer: Any, name: str | None = None, interval: str = "epoch") -> SimpleNamespace:
    return SimpleNamespace(scheduler=StepLR(optimizer, 1), name=name, interval=interval)


class FakeModule:
    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self.how: set[tuple[bool, bool]] = set()

    def log(self, name: str, value: float, *, on_step: bool, on_epoch: bool, **_: Any) -> None:
        self.logged[name] = float(value)
        self.how.add((on_step, on_epoch))


def names(optimizers: list[Any], configs: list[Any]) -> list[list[str]]:
    return [found for _, found, _ in group_names(optimizers, configs)]


def test_names():
    adam, other = Adam([parameter()]), Adam([parameter()])
    groups = SGD([{"params": [parameter()]}, {"params": [parameter()], "name": "head"}], lr=1.0)
    assert names([adam], []) == [["lr-Adam"]]
    assert names([adam, other], []) == [["lr-Adam"], ["lr-Adam-1"]]
    assert names([groups], []) == [["lr-SGD/pg1", "lr-SGD/head"]]
    assert names([adam], [scheduled(adam, "warmup")]) == [["warmup"]]
    # one with a scheduler comes first, and each optimizer once
    assert names([adam, other], [scheduled(other), scheduled(other)]) == [["lr-Adam"], ["lr-Adam-1"]]
    assert group_names([adam, other], [scheduled(other)])[0][0] is other


def test_repeated_group_names():
    groups = SGD([{"params": [parameter()], "name": "a"}, {"params": [parameter()], "name": "a"}], lr=1.0)
    with pytest.raises(ConfigurationError, match="same name: a"):
        names([groups], [])


@pytest.mark.parametrize(
    ("wish", "at_step", "at_epoch"),
    [
        (None, {"per-step", "lr-SGD"}, {"per-epoch"}),
        ("step", {"per-step", "per-epoch", "lr-SGD"}, set()),
        ("epoch", set(), {"per-step", "per-epoch", "lr-SGD"}),
    ],
)
def test_intervals(wish, at_step, at_epoch):
    one, two, three = (SGD([parameter()], lr=lr) for lr in (0.1, 0.2, 0.3))
    configs = [scheduled(one, "per-step", "step"), scheduled(two, "per-epoch", "epoch")]
    trainer = SimpleNamespace(optimizers=[one, two, three], lr_scheduler_configs=configs)
    callback = LearningRateMonitor(wish)
    callback.on_train_start(trainer, None)
    epoch, step = FakeModule(), FakeModule()
    callback.on_train_epoch_start(trainer, epoch)
    callback.on_train_batch_start(trainer, step, None, 0)
    assert set(epoch.logged) == at_epoch and epoch.how <= {(False, True)}
    assert set(step.logged) == at_step and step.how <= {(True, False)}


def test_values_follow_the_optimizer():
    adam = Adam([parameter()], lr=0.1, betas=(0.8, 0.9), weight_decay=0.3)
    sgd = SGD([parameter()], lr=0.2, momentum=0.7)
    trainer = SimpleNamespace(optimizers=[adam, sgd], lr_scheduler_configs=[])
    callback = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    callback.on_train_start(trainer, None)
    adam.param_groups[0]["lr"] = 0.05
    module = FakeModule()
    callback.on_train_batch_start(trainer, module, None, 0)
    assert module.logged == {
        "lr-Adam": 0.05,
        "lr-Adam-momentum": 0.8,
        "lr-Adam-weight_decay": 0.3,
        "lr-SGD": 0.2,
        "lr-SGD-momentum": 0.7,
        "lr-SGD-weight_decay": 0.0,
    }


def test_bad_interval():
    with pytest.raises(ConfigurationError, match="batch"):
        LearningRateMonitor("batch")


@pytest.mark.parametrize("kind", [LearningRateMonitor, DeviceStatsMonitor, ThroughputMonitor])
def test_without_a_logger_it_says_so(kind, local_trainer, caplog):
    with caplog.at_level("WARNING", "raytrainer"):
        trainer = local_trainer(max_epochs=1, callbacks=kind())
        trainer.fit(Tiny(), data(4))
    assert f"{kind.__name__}: Trainer(logger=False)" in caplog.text
    assert kind is not LearningRateMonitor or trainer.callback_metrics["lr-SGD"] == 0.1
