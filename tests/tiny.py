"""The smallest module that trains, and what it saw; for tests of whole runs in process."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from raytrainer import Module


def data(samples: int = 20, batch_size: int = 2, seed: int = 1, **options: Any) -> DataLoader[Any]:
    """Pairs of 4 numbers and 2, always the same."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(samples, 4, generator=generator), torch.randn(samples, 2, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **options)


class Clock:
    """Stands for the module `time`; it moves by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


class Tiny(Module):
    """A linear model; `events` tells what happened: "t", "v", "|" for a batch, a validation, an epoch's end."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.layer = torch.nn.Linear(4, 2)
        self.events: list[str] = []

    def forward(self, x):
        return self.layer(x)

    def loss(self, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(self(x), y)

    def training_step(self, batch, batch_idx):
        self.events.append("t")
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def on_validation_start(self):
        self.events.append("s" if self.trainer.sanity_checking else "v")

    def on_train_epoch_end(self):
        self.events.append("|")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    @property
    def story(self) -> str:
        """Events, with batches in a row counted: "10 v | 10 v |"."""
        parts: list[str] = []
        for event in self.events:
            if event == "t" and parts and parts[-1].isdigit():
                parts[-1] = str(int(parts[-1]) + 1)
            else:
                parts.append("1" if event == "t" else event)
        return " ".join(parts)


def weights(module: torch.nn.Module) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])
