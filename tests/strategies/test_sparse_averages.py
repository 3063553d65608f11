"""Sparse gradients over workers: averaged without gloo's own sum of them, which writes to memory that is freed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import raytrainer as rt


class Embeds(rt.Module):
    """Notes which collectives gloo has been asked for."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.rows, self.layer = nn.Embedding(7, 2, sparse=sparse), nn.Linear(2, 1)
        self.asked: set[str] = set()

    def on_train_start(self):
        self.__dict__["profile"] = torch.autograd.profiler.profile()
        self.profile.__enter__()

    def on_train_end(self):
        profile = self.__dict__.pop("profile")
        profile.__exit__(None, None, None)
        self.asked = {event.name for event in profile.function_events if event.name.startswith("gloo:")}

    def training_step(self, batch, batch_idx):
        return self.layer(self.rows(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.3)


@pytest.mark.parametrize("compression", [None, "fp16"])
def test_as_dense_ones(forked, compression):
    trained = {}
    for sparse in (True, False):
        module = trained[sparse] = Embeds(sparse)
        strategy = rt.DDP(gradient_compression=compression)
        rows = torch.tensor([0, 3, 3, 1, 6, 2, 2, 2])  # of which each worker has others
        forked(strategy=strategy, max_epochs=2).fit(module, torch.utils.data.DataLoader(rows, batch_size=2))
    assert "gloo:all_reduce" in trained[True].asked and "gloo:sparse_all_reduce" not in trained[True].asked
    close = {"rtol": 0.02, "atol": 0.02} if compression else {}
    for one, other in zip(trained[True].parameters(), trained[False].parameters(), strict=True):
        torch.testing.assert_close(one, other, **close)
    assert not torch.equal(trained[True].rows.weight, Embeds().rows.weight)
