"""Optimizers that decide by the loss: workers see different losses, and must decide alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from raytrainer import Module


class Searching(Module):
    """Counts the evaluations of each step."""

    def __init__(self, automatic: bool) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.layer = torch.nn.Linear(4, 1).double()
        self.evaluations: list[int] = []

    def loss(self, batch: Any) -> torch.Tensor:
        self.evaluations[-1] += 1
        return (self.layer(batch[0]).tanh() - batch[0].sum(1, keepdim=True)).pow(2).mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.evaluations.append(0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        return None

    def on_train_end(self) -> None:
        if self.trainer.world_size > 1:
            everybody: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everybody, (self.evaluations, self.layer.weight.tolist()))
            assert all(one == everybody[0] for one in everybody)

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=5, line_search_fn="strong_wolfe")


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_workers_evaluate_equally_often(automatic: bool, forked: Any) -> None:
    found = []
    samples = torch.randn(16, 4, dtype=torch.float64)
    for workers in (1, 2):
        torch.manual_seed(0)
        module = Searching(automatic)
        options: dict[str, Any] = {"num_processes": 2, "strategy": "ddp"} if workers == 2 else {"strategy": "local"}
        forked(max_epochs=1, **options).fit(module, DataLoader(TensorDataset(samples), 8 // workers))
        found.append((module.evaluations, module.layer.weight.detach()))
    (alone, weight), (both, other) = found
    assert alone == both and max(alone) > 1
    torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-8)
