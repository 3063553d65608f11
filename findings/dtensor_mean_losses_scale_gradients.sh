#!/usr/bin/env bash
# torch 2.13.0: gradients of DTensors through mse_loss and other mean losses are too large by the number of ranks.
#
# Guess: as the loss in one process, value and gradient, for any number of ranks, or an error; what holds for `.mean()`
# of the same numbers holds for `reduction="mean"`.
# Seen: with two ranks the values of `mse_loss`, `huber_loss`, `smooth_l1_loss`, `binary_cross_entropy` and
# `soft_margin_loss` are right and their gradients are twice what they are in one process: each rank divides by its own
# part's length only. With shards of unequal length the values are wrong too (a mean of the ranks' means), that of
# `binary_cross_entropy_with_logits` included. `(x - y).pow(2).mean()`, `l1_loss` and `reduction="sum"` are right.
# `cosine_embedding_loss` of shards of the second dimension adds its 1 once a rank. The gradient of `x.norm(inf)` is NaN
# but for one number. Nothing is raised; AdamW, to which a factor is nothing, hides it.
#
# Run: findings/dtensor_mean_losses_scale_gradients.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

# a loss, what its gradient is times the right one on average, and whether its value is right for unequal shards
losses = {
    "(x - y).pow(2).mean()": (lambda x, y: (x - y).pow(2).mean(), 1, True),
    "l1_loss": (F.l1_loss, 1, True),
    "mse_loss, sum": (lambda x, y: F.mse_loss(x, y, reduction="sum"), 1, True),
    "mse_loss": (F.mse_loss, 2, False),
    "huber_loss": (F.huber_loss, 2, False),
    "smooth_l1_loss": (F.smooth_l1_loss, 2, False),
    "soft_margin_loss": (lambda x, y: F.soft_margin_loss(x, (y > 0).float() * 2 - 1), 2, False),
    "binary_cross_entropy": (lambda x, y: F.binary_cross_entropy(x.sigmoid(), (y > 0).float()), 2, False),
    "binary_cross_entropy_with_logits": (
        lambda x, y: F.binary_cross_entropy_with_logits(x, (y > 0).float()),
        1,
        False,
    ),
}


def cosine(x, y):
    return F.cosine_embedding_loss(x, y, (y[:, 0] * 0 + 1).float())


def work(rank, ranks, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))

    def both(loss, x, y, dimension=0):
        """Value and gradient of the loss, in one process and of shards."""
        found = []
        for give in (torch.clone, lambda tensor: distribute_tensor(tensor, mesh, [Shard(dimension)])):
            own = give(x).requires_grad_()
            value = loss(own, give(y))
            value.backward()
            found.append((value.detach(), own.grad))
        value, gradient = (part.full_tensor() for part in found[1])
        return *found[0], value, gradient

    torch.manual_seed(0)
    for name, (loss, factor, right) in losses.items():
        for rows in (4, 5):
            value, gradient, seen, seen_gradient = both(loss, torch.randn(rows, 4), torch.randn(rows, 4))
            times = (seen_gradient / gradient).mean().item()
            if rank == 0:
                print(
                    f"{name}, {rows} rows: {seen:.4f}, right is {value:.4f}; gradient {times:.2f} times the right one"
                )
            assert torch.allclose(seen, value, rtol=1e-4) == (right or rows == 4), name
            assert abs(times - factor) < 1e-3, (name, times)
    value, _, seen, _ = both(cosine, torch.randn(4, 4), torch.randn(4, 4), dimension=1)
    _, _, _, gradient = both(lambda x, y: x.norm(float("inf")), torch.randn(4, 4), torch.randn(4, 4))
    if rank == 0:
        print(f"cosine_embedding_loss: {seen:.4f}, right is {value:.4f}")
        print(f"gradient of norm(inf): {int(gradient.isnan().sum())} of 16 are NaN")
    assert abs(seen - value - 1) < 1e-4 and gradient.isnan().sum() == 15
    dist.destroy_process_group()


with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(work, (2, os.path.join(folder, "store")), nprocs=2, start_method="fork")
PYTHON
