"""Hooks freeze, unfreeze and switch parts; a run that goes on from any checkpoint does not call them again."""

from __future__ import annotations

import pytest
import torch
from tiny import Tiny, data, weights

from raytrainer import EMAWeightAveraging, ModelCheckpoint


class Parts(Tiny):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))

    def forward(self, x):
        return self.layer(self.body(x))


class Unfreezes(Parts):
    def __init__(self):
        super().__init__()
        self.body.requires_grad_(False)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.body.requires_grad_(True)


class Switches(Parts):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.body.eval()


class FreezesWithin(Parts):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 7:
            self.body[0].requires_grad_(False)
            self.body[1].eval()


class Adds(Parts):
    """A parameter group, which the scheduler drives along."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.layer.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            group = {"params": list(self.body[0].parameters()), "lr": 0.01, "initial_lr": 0.01, "weight_decay": 0.1}
            self.optimizers().add_param_group(group)


class FreezesAtFirst(Parts):
    """In `configure_optimizers`."""

    def configure_optimizers(self):
        self.body.requires_grad_(False)
        self.body[2].eval()
        return super().configure_optimizers()

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.body.requires_grad_(True)
            self.body[2].train()


class TogglesAcross(Parts):
    """Batches, so that a checkpoint is made in between."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if batch_idx % 2 == 0:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        if batch_idx % 2:
            self.untoggle_optimizer(optimizer)


@pytest.mark.sample(5)
@pytest.mark.parametrize("kind", [Unfreezes, Switches, FreezesWithin, Adds, FreezesAtFirst, TogglesAcross])
@pytest.mark.parametrize("averaging", [False, True])  # which has checkpoints made within validations
def test_a_resumed_run_trains_what_it_trained(kind, averaging, local_trainer, tmp_path):
    options = {"max_epochs": 3, "seed": 1, "val_check_interval": 3}

    def fit(module, *callbacks, **where):
        callbacks += (EMAWeightAveraging(0.9),) if averaging else ()
        local_trainer(**options, callbacks=list(callbacks)).fit(module, data(), data(4), **where)
        return {"weights": weights(module), "norm": module.body[1].running_mean.clone()}

    whole = kind()
    by_step = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    by_value = ModelCheckpoint(tmp_path, "v{step}", "val_loss", save_top_k=-1, auto_insert_metric_name=False)
    expected = fit(whole, by_step, by_value)
    for name in ("step=8", "v9", "step=13", "step=14", "v16", "step=20", "step=23"):
        found = fit(kind(), ckpt_path=tmp_path / f"{name}.ckpt")
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


def test_what_has_not_changed_is_not_imposed(local_trainer, tmp_path):
    """A run may go on with other parts frozen, on purpose."""
    saving = ModelCheckpoint(tmp_path, save_last=True)
    local_trainer(max_epochs=1, callbacks=saving).fit(Parts(), data())
    frozen = Parts()
    frozen.layer.requires_grad_(False)
    frozen.body[2].eval()
    local_trainer(max_epochs=2).fit(frozen, data(), ckpt_path=tmp_path / "last.ckpt")
    assert not frozen.layer.weight.requires_grad and not frozen.body[2].training
    assert torch.equal(frozen.layer.weight, Parts.load_from_checkpoint(tmp_path / "last.ckpt").layer.weight)
