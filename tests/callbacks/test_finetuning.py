from __future__ import annotations

import pytest
import torch
from exact import Died, Exact, run, same
from tiny import Tiny, data
from torch import nn

from raytrainer import (
    BackboneFinetuning,
    BaseFinetuning,
    ConfigurationError,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WorkerCallback,
)


class Backed(Tiny):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.rates, self.moved = [], []

    def forward(self, x):
        return self.layer(self.backbone(x))

    def on_train_epoch_start(self):
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])
        self.before = {name: p.detach().clone() for name, p in self.named_parameters()}
        self.before["mean"] = self.backbone[1].running_mean.clone()

    def on_train_epoch_end(self):
        now = {**dict(self.named_parameters()), "mean": self.backbone[1].running_mean}
        self.moved.append({name for name, value in self.before.items() if not torch.equal(value, now[name])})

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


HEAD, NORM = {"layer.weight", "layer.bias"}, {"backbone.1.weight", "backbone.1.bias"}
BODY = {f"backbone.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}


@pytest.mark.parametrize("train_bn", [True, False])
def test_the_backbone_waits(train_bn, local_trainer):
    module = Backed()
    callback = BackboneFinetuning(2, lambda epoch: 3.0, train_bn=train_bn)
    local_trainer(max_epochs=6, callbacks=callback).fit(module, data())
    early = HEAD | NORM | {"mean"} if train_bn else HEAD
    assert module.moved == [early] * 2 + [HEAD | NORM | BODY | {"mean"}] * 4
    assert [len(rates) for rates in module.rates] == [1, 1, 2, 2, 2, 2]
    assert [rates[-1] for rates in module.rates[2:]] == pytest.approx([0.01, 0.03, 0.09, 0.1])  # aligned with the head


def test_the_learning_rate_of_the_new_group_is_logged(local_trainer):
    trainer = local_trainer(
        max_epochs=2, callbacks=[LearningRateMonitor(), BackboneFinetuning(1)], log_every_n_steps=1, logger=True
    )
    trainer.fit(Backed(), data())
    rates = {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith("lr-")}
    assert rates == pytest.approx({"lr-SGD": 0.1, "lr-SGD/pg1": 0.1, "lr-SGD/pg2": 0.01})


def test_learning_rates(local_trainer):
    module = Backed()
    callback = BackboneFinetuning(1, lambda epoch: float(epoch), backbone_initial_lr=0.05, should_align=False)
    local_trainer(max_epochs=4, callbacks=callback).fit(module, data())
    assert [rates[-1] for rates in module.rates[1:]] == pytest.approx([0.05, 0.15, 0.6])


class Deep(Exact):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.backbone = self.net[:2]

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


@pytest.mark.parametrize("batches", [9, 15, 22, 36])
def test_exact_resume(batches, tmp_path):
    """Before the backbone is unfrozen (epoch 1), right after, and in the epoch that raises its learning rate."""

    def callbacks():
        saving = ModelCheckpoint(tmp_path / "c", save_top_k=0, save_last=True, every_n_train_steps=1)
        return [BackboneFinetuning(1, train_bn=False), saving]

    calm = Deep()
    run(calm, tmp_path, callbacks=[BackboneFinetuning(1, train_bn=False)])
    with pytest.raises(Died):
        run(Deep((0, batches), flag=f"{tmp_path}/flag"), tmp_path, callbacks=callbacks())
    module = Deep()
    run(module, tmp_path, callbacks=callbacks(), ckpt_path="last")
    assert same(module, calm)


def test_helpers(caplog, monkeypatch):
    monkeypatch.setattr(__import__("logging").getLogger("raytrainer"), "propagate", True)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    BaseFinetuning.freeze(module[:2], train_bn=False)
    assert [p.requires_grad for p in module.parameters()] == [False] * 4 + [True] * 2
    assert not module[1].track_running_stats
    optimizer = torch.optim.SGD(module[2].parameters(), lr=1.0)
    BaseFinetuning.unfreeze_and_add_param_group([[module[0]], [[module[1]]]], optimizer, train_bn=False)
    assert [p.requires_grad for p in module.parameters()] == [True, True, False, False, True, True]
    assert len(optimizer.param_groups) == 2 and optimizer.param_groups[1]["lr"] == 0.1
    assert optimizer.param_groups[1]["params"] == list(module[0].parameters())
    BaseFinetuning.unfreeze(module)
    assert module[1].track_running_stats and all(p.requires_grad for p in module.parameters())
    BaseFinetuning.unfreeze_and_add_param_group(module[0], optimizer)
    assert len(optimizer.param_groups) == 2 and "already" in caplog.text


@pytest.mark.parametrize("train_bn", [True, False])
def test_batch_normalisation_is_added_on_request_only(train_bn):
    """Also where nobody has frozen it."""
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    BaseFinetuning.unfreeze_and_add_param_group(module, optimizer, train_bn=train_bn)
    assert len(optimizer.param_groups[1]["params"]) == (3 if train_bn else 1)


def test_no_backbone(local_trainer):
    with pytest.raises(ConfigurationError, match="Tiny has no module `backbone`"):
        local_trainer(callbacks=BackboneFinetuning()).fit(Tiny(), data())
    with pytest.raises(ConfigurationError, match="unfreeze_backbone_at_epoch"):
        BackboneFinetuning(-1)


def _schedulers(kind, optimizer):
    of = torch.optim.lr_scheduler
    if kind == "sequential":
        parts = [of.LinearLR(optimizer, 0.5, 1.0, 2), of.CosineAnnealingLR(optimizer, 4)]
        return of.SequentialLR(optimizer, parts, [3])
    if kind == "chained":
        return of.ChainedScheduler([of.LambdaLR(optimizer, lambda e: 0.5**e), of.ConstantLR(optimizer, 0.5, 2)])
    if kind == "plateau":
        return {"scheduler": of.ReduceLROnPlateau(optimizer, min_lr=[0.01]), "monitor": "train"}
    return {
        "lambda": lambda: of.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
        "multiplicative": lambda: of.MultiplicativeLR(optimizer, lambda epoch: 0.5),
        "cosine": lambda: of.CosineAnnealingLR(optimizer, 5),
        "one cycle": lambda: of.OneCycleLR(optimizer, 0.3, total_steps=6),
        "cyclic": lambda: of.CyclicLR(optimizer, 0.1, 0.4, step_size_up=2),
        "exponential": lambda: of.ExponentialLR(optimizer, 0.5),
    }[kind]()


class Scheduled(Backed):
    kind = "lambda"

    def training_step(self, batch, batch_idx):
        self.log("train", float(self.current_epoch), on_epoch=True)  # never improves
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = _schedulers(self.kind, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class UnfreezesOnce(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.backbone)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(module.backbone, optimizer)


KINDS = ["lambda", "multiplicative", "cosine", "one cycle", "cyclic", "exponential", "sequential", "chained", "plateau"]


@pytest.mark.parametrize("kind", KINDS)
def test_schedulers_drive_the_added_group_with_the_first(kind, local_trainer, tmp_path):
    module = Scheduled()
    module.kind = kind
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    local_trainer(max_epochs=6, callbacks=[UnfreezesOnce(), saving]).fit(module, data())
    assert [len(rates) for rates in module.rates] == [1, 1, 2, 2, 2, 2]
    assert len({rates[0] for rates in module.rates}) > 1 or kind == "plateau"
    for first, second in module.rates[3:]:
        assert second == pytest.approx(first / 10, abs=1e-12) or kind == "plateau"
    again = Scheduled()
    again.kind = kind
    checkpoint = next(path for path in tmp_path.iterdir() if "epoch=3" in path.name)
    local_trainer(max_epochs=6, callbacks=UnfreezesOnce()).fit(again, data(), ckpt_path=checkpoint)
    assert again.rates == module.rates[4:]


class AddsInMidEpoch(WorkerCallback):
    """A user's own: nothing is told of the group."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 25:
            module.backbone.requires_grad_(True)
            (optimizer,) = trainer.optimizers
            optimizer.add_param_group(
                {"params": list(module.backbone.parameters()), "lr": optimizer.param_groups[0]["lr"] / 10}
            )


class FrozenAtFirst(Scheduled):
    def on_train_epoch_start(self):
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])

    def on_train_epoch_end(self):
        pass

    def configure_optimizers(self):
        self.backbone.requires_grad_(False)
        return super().configure_optimizers()


class Stepped(FrozenAtFirst):
    """Steps all by hand."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        if self.trainer.is_last_batch:
            self.lr_schedulers().step(*([1.0] if self.kind == "plateau" else []))


@pytest.mark.parametrize("kind", [*KINDS, "swa", "swa by group", "lambda, by hand", "plateau, by hand"])
def test_a_group_that_a_hook_adds_in_mid_epoch(kind, local_trainer, tmp_path):
    """Also with a checkpoint between that and the scheduler's next step."""

    def made():
        module = Stepped() if "hand" in kind else FrozenAtFirst()
        module.kind = kind.removesuffix(", by hand").replace("swa by group", "lambda").replace("swa", "exponential")
        averaging = [StochasticWeightAveraging([0.02] if "group" in kind else 0.02, 1, 2)] if "swa" in kind else []
        return module, [AddsInMidEpoch(), *averaging]

    module, callbacks = made()
    averages = len(callbacks) > 1
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    local_trainer(max_epochs=6, callbacks=[*callbacks, saving]).fit(module, data())
    assert [len(rates) for rates in module.rates] == [1, 1, 1, 2, 2, 2]
    for first, second in module.rates[3:]:
        assert second == pytest.approx(first / 10, abs=1e-12) or "plateau" in kind or averages
    assert module.rates[5] == pytest.approx([0.02, 0.02]) or not averages
    for step in (27, 35):
        again, callbacks = made()
        local_trainer(max_epochs=6, callbacks=callbacks).fit(again, data(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert again.rates[-2:] == module.rates[-2:]
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), module.parameters(), strict=True))
