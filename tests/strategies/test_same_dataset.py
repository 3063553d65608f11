"""What data hooks draw is the same on all workers: each takes its part of one dataset, not of one of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, random_split

import raytrainer as rt

NUMBERS = TensorDataset(torch.arange(32.0))


class Splits(rt.DataModule):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self.parts = random_split(NUMBERS, [16, 16])

    def train_dataloader(self) -> Any:
        if self.where == "loader":
            self.parts = random_split(NUMBERS, [16, 16])
        return DataLoader(self.parts[0], 2, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts[1], 2)


class Gathers(rt.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.trained: list[list[float]] = []
        self.validated: list[float] = []
        self.now: list[float] = []

    def training_step(self, batch, batch_idx):
        self.now += batch[0].tolist()
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch[0].tolist()

    def gathered(self, numbers: list[float]) -> list[float]:
        found: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(found, numbers)
        return sorted(number for part in found for number in part)

    def on_train_epoch_end(self):
        self.trained.append(self.gathered(self.now))
        self.now = []

    def on_train_end(self):
        self.validated = self.gathered(self.validated)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("reload", [0, 1])
@pytest.mark.parametrize("where", ["setup", "loader"])
def test_a_random_split_is_one_for_all(where, reload, forked):
    module = Gathers()
    trainer = forked(max_epochs=2, num_sanity_val_steps=0, limit_val_batches=0 if reload else 1.0)
    if reload:
        trainer = forked(max_epochs=2, limit_val_batches=0, reload_dataloaders_every_n_epochs=1)
    trainer.fit(module, datamodule=Splits(where))
    assert all(len(set(epoch)) == 16 for epoch in module.trained)
    assert (module.trained[0] != module.trained[1]) == (where == "loader" and reload == 1)
    if not reload:
        assert sorted(module.trained[0] + module.validated[::2]) == sorted(NUMBERS.tensors[0].tolist())
