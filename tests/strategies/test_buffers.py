"""Buffers of rank 0 for everybody, however they lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from raytrainer import Module

KINDS = {
    "plain": lambda: torch.zeros(2, 3),
    "every second": lambda: torch.zeros(2, 6)[:, ::2],
    "transposed": lambda: torch.zeros(3, 2).t(),
    "expanded": lambda: torch.zeros(2, 1).expand(2, 3),
    "part of another": lambda: torch.zeros(4, 5)[1:3, 1:4],
}


class Marks(Module):
    """Each worker's buffer says its rank; validation reports what it says then, and what lies between its numbers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = torch.nn.Linear(2, 1)

    def on_fit_start(self) -> None:
        self.register_buffer("mark", KINDS[self.kind](), persistent=False)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        rank = float(self.trainer.global_rank)
        self.memory = torch.as_strided(self.mark, (self.mark.untyped_storage().nbytes() // 4,), (1,), 0)
        self.memory.fill_(-1.0 - rank)
        narrowed = self.mark[:, :1] if self.kind == "expanded" else self.mark
        narrowed.copy_(torch.arange(narrowed.numel()).reshape(narrowed.shape) + 100 * rank)
        self.between = self.memory[self.memory < 0].clone()

    def validation_step(self, batch, batch_idx):
        rows = torch.arange(2.0)[:, None].expand(2, 3)
        expected = rows if self.kind == "expanded" else torch.arange(6.0).reshape(2, 3)
        self.log("right", float(torch.equal(self.mark, expected)), reduce_fx="min")
        self.log("spared", float(torch.equal(self.memory[self.memory < 0], self.between)), reduce_fx="min")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# torch's DDP itself refuses expanded buffers
@pytest.mark.parametrize(
    "strategy, kind", [(s, k) for s in ("ddp", "fsdp") for k in KINDS if (s, k) != ("ddp", "expanded")]
)
def test_rank_0s_in_any_layout(strategy, kind, forked):
    loader = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=1)
    trainer = forked(strategy=strategy, max_epochs=1, check_val_every_n_epoch=1, num_sanity_val_steps=0)
    trainer.fit(Marks(kind), loader, loader)
    assert [float(trainer.callback_metrics[name]) for name in ("right", "spared")] == [1.0, 1.0]
