#!/usr/bin/env bash
# torch 2.13.0: gradients that fully_shard has not synchronized yet survive `zero_grad`, and clipping does not see them.
#
# Guess: with `set_requires_gradient_sync(False)` gradients collect in `.grad`, as with DDP's `no_sync`; `zero_grad`
# drops what a step is not to have (a bad micro-batch, say).
# Seen: they collect out of sight. `.grad` is None, the norm is 0 and `step` does nothing; after `zero_grad` the next
# synchronized backward pass adds them all the same: twice the gradient here, and NaN if the dropped batch had one, with
# no way back in the API.
#
# Run: findings/fsdp2_zero_grad_keeps_unsynchronized_gradients.sh    Fails if this changes.
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
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh


def make(mesh):
    torch.manual_seed(0)
    return fully_shard(nn.Linear(4, 2), mesh=mesh)


def work(rank, ranks, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    batch = torch.ones(2, 4) * (rank + 1)
    expected = make(mesh)
    expected(batch).sum().backward()
    right = expected.weight.grad.full_tensor()
    for dropped in (1.0, float("nan")):
        module = make(mesh)
        module.set_requires_gradient_sync(False)
        (module(batch).sum() * dropped).backward()
        unseen = [part.grad for part in module.parameters()]
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0).item()
        module.zero_grad()
        module.set_requires_gradient_sync(True)
        module(batch).sum().backward()
        share = (module.weight.grad.full_tensor() / right).unique().tolist()
        if rank == 0:
            print(
                f"a batch dropped by zero_grad (its loss times {dropped}): .grad was {unseen}, the norm {norm}; "
                f"the next gradient is {share} of what it should be"
            )
        assert unseen == [None, None] and norm == 0.0
        assert share == [2.0] if dropped == 1.0 else torch.tensor(share).isnan().all()
    dist.destroy_process_group()


with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(work, (2, os.path.join(folder, "store")), nprocs=2, start_method="fork")
PYTHON
