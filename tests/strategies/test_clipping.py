"""Clipping, dense and sparse: the numbers of torch's own functions for dense gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from raytrainer import Module
from raytrainer.strategies.clipping import clip_whole_gradients


class Net(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.rows, self.layer = nn.Embedding(5, 3, sparse=sparse).double(), nn.Linear(3, 2).double()
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.layer(self.rows(x)).exp().sum()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("value", [0.05, 1e6])
def test_sparse_as_dense(algorithm, value):
    x = torch.tensor([0, 3, 3, 3, 1])  # a row that occurs several times counts with its sum
    dense, sparse = Net(sparse=False), Net(sparse=True)
    for net in (dense, sparse):
        net(x).backward()
    before = copy.deepcopy(dense.layer.weight.grad)
    clip_whole_gradients(dense.parameters(), value, algorithm)
    clip_whole_gradients(sparse.parameters(), value, algorithm)
    assert sparse.rows.weight.grad.is_sparse
    for one, other in zip(dense.parameters(), sparse.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None
        else:
            torch.testing.assert_close(other.grad.to_dense(), one.grad)
    assert torch.equal(before, dense.layer.weight.grad) is (value == 1e6)


def test_a_gradient_without_rows():
    net = Net(sparse=True)
    net(torch.tensor([], dtype=torch.int64)).backward()
    clip_whole_gradients([net.rows.weight], 1.0, "norm")
    assert net.rows.weight.grad._nnz() == 0


@pytest.mark.parametrize("algorithm", ["value", "norm"])
def test_nothing_is_clipped_without_gradients(algorithm):
    clip_whole_gradients([nn.Parameter(torch.ones(2))], 0.5, algorithm)


def test_a_run_that_clips(local_trainer):
    class Embeds(Module):
        def __init__(self, sparse):
            super().__init__()
            self.net = Net(sparse)

        def training_step(self, batch, batch_idx):
            return self.net(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    one, other = Embeds(True), Embeds(False)
    for module in (one, other):
        loader = torch.utils.data.DataLoader(torch.arange(20) % 5, batch_size=4)
        local_trainer(max_epochs=2, gradient_clip_val=0.1, accumulate_grad_batches=2).fit(module, loader)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
