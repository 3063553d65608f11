"""Optimizers that go by other numbers on one worker are told of, where weights in shards tell nothing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import raytrainer
from raytrainer.errors import DisagreementError


class Net(raytrainer.Module):
    def __init__(self, change=None, capturable=False):
        super().__init__()
        self.layer, self.change, self.capturable = torch.nn.Linear(4, 1), change, capturable

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        lr = torch.tensor(0.1) if self.capturable else 0.1
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, foreach=False if self.capturable else None)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_rank == 1 and batch_idx == 2 and self.change:
            name, value = self.change
            optimizer = self.trainer.optimizers[0]
            if name == "group":
                optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": value})
            elif name == "schedule":
                self.trainer.lr_scheduler_configs[0].scheduler.step()
            else:
                optimizer.param_groups[0][name] = value


def fit(forked, strategy, module):
    forked(strategy=strategy, max_epochs=3).fit(module, DataLoader(TensorDataset(torch.randn(24, 4)), 2))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("lr", 0.5), r"\[1\] have another lr of AdamW, group 0: 0\.05, where rank 0 has 0\.01"),
        (("weight_decay", 0.5), r"another weight_decay of AdamW, group 0: 0\.5, where rank 0 has 0\.01"),
        (("betas", (0.5, 0.9)), r"another betas of AdamW, group 0: \(0\.5, 0\.9\), where rank 0 has \(0\.9, 0\.999\)"),
        (("group", 0.3), r"another .* of AdamW, group 1: .*, where rank 0 has None"),
        (("schedule", None), r"another lr of AdamW, group 0: 0\.001\d*, where rank 0 has 0\.01"),
    ],
    ids=["lr", "weight_decay", "betas", "group", "schedule"],
)
def test_another_setting_on_one_worker(change, said, strategy, forked):
    with pytest.raises(DisagreementError, match=said):
        fit(forked, strategy, Net(change))


@pytest.mark.parametrize("kind", [raytrainer.DDP, raytrainer.FSDP])
def test_nobody_looks_where_that_is_not_wanted(kind, forked):
    fit(forked, kind(check_replicas=False), Net(("lr", 0.5)))
    with pytest.raises(DisagreementError, match="another lr"):
        fit(forked, kind(), Net(("lr", 0.5)))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("capturable", [False, True])
def test_the_same_ones(capturable, strategy, forked):
    fit(forked, strategy, Net(capturable=capturable))
