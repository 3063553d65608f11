#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.nn.functional.all_reduce with MAX, MIN or PRODUCT has another function's gradient.
#
# Guess: the differentiable all_reduce gives, as `torch.maximum` does, the gradient to the rank whose value won; or it
# refuses what it cannot differentiate.
# Seen: backward reduces the gradients with the same operation. With MAX, every rank, losers too, gets the largest of
# the ranks' gradients (2 and 2, where 0 and 3 is right), with MIN the smallest, with PRODUCT their product, without the
# other factors. SUM and AVG are right. No warning.
#
# Run: findings/gradient_of_all_reduce_max_is_a_max.sh    Fails if this changes.
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
import torch.distributed.nn.functional as differentiable
import torch.multiprocessing as mp

kinds = {
    "SUM": (torch.add, (3.0, 3.0)),
    "AVG": (lambda x, y: (x + y) / 2, (1.5, 1.5)),
    "MAX": (torch.maximum, (2.0, 2.0)),
    "MIN": (torch.minimum, (1.0, 1.0)),
    "PRODUCT": (torch.mul, (2.0, 2.0)),
}


def work(rank, ranks, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    for name, (function, expected) in kinds.items():
        x = torch.tensor(rank + 2.0, requires_grad=True)
        y = differentiable.all_reduce(x, getattr(dist.ReduceOp, name))
        (y * (rank + 1)).backward()  # the loss of all is the sum of both ranks'
        both = [torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)]
        whole = function(*both)
        assert torch.equal(whole, y.detach())
        (whole * 1 + whole * 2).backward()
        right = tuple(part.grad.item() for part in both)
        if rank == 0:
            print(f"{name}: gradients {expected}, right are {right}")
        assert x.grad.item() == expected[rank], (name, x.grad)
        assert (expected == right) == (name in ("SUM", "AVG")), name
    dist.destroy_process_group()


with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(work, (2, os.path.join(folder, "store")), nprocs=2, start_method="fork")
PYTHON
