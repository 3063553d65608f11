#!/usr/bin/env bash
# torch 2.13.0: `if`, `float()` and `.item()` of a reduced DTensor see the own rank's share only.
#
# Guess: a reduction of a sharded tensor that becomes a Python number is finished first, or refused: `torch.equal` of
# DTensors asks all ranks, and `numpy()` and `tolist()` raise.
# Seen: `x.sum().item()` is the sum of this rank's rows; `bool(x.isnan().any())` is True on the rank that has the NaN
# and False on the other; so is `not x.isfinite().all()`. A check "skip the step if there is a NaN" takes different
# branches on different ranks, and nothing says so. `get_total_norm` of gradients is the same everywhere for the 2-norm
# and other finite ones (it comes back replicated), but with `inf` each rank reads its own maximum. Only `full_tensor()`
# is the whole.
#
# Run: findings/dtensor_conditions_are_one_ranks_own.sh    Fails if this changes.
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
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.utils import get_total_norm


def work(rank, ranks, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    x = distribute_tensor(torch.tensor([1.0, 2.0, 3.0, 4.0]), mesh, [Shard(0)])
    hurt = distribute_tensor(torch.tensor([1.0, 2.0, 3.0, float("nan")]), mesh, [Shard(0)])
    norms = {kind: get_total_norm([x, x], kind) for kind in (1.0, 2.0, float("inf"))}
    seen = {
        "sum().item()": x.sum().item(),
        "float(max())": float(x.max()),
        "sum().full_tensor()": x.sum().full_tensor().item(),
        "if isnan().any()": bool(hurt.isnan().any()),
        "if not isfinite().all()": not hurt.isfinite().all(),
        "equal": torch.equal(x, hurt),
        **{f"{kind:g}-norm of gradients": round(float(norm), 4) for kind, norm in norms.items()},
        "inf-norm, full_tensor()": norms[float("inf")].full_tensor().item(),
    }
    expected = {
        "sum().item()": (3.0, 7.0),
        "float(max())": (2.0, 4.0),
        "sum().full_tensor()": (10.0, 10.0),
        "if isnan().any()": (False, True),
        "if not isfinite().all()": (False, True),
        "equal": (False, False),
        "1-norm of gradients": (20.0, 20.0),
        "2-norm of gradients": (7.746, 7.746),
        "inf-norm of gradients": (2.0, 4.0),
        "inf-norm, full_tensor()": (4.0, 4.0),
    }
    for what, value in seen.items():
        if rank == 0:
            print(f"{what}: {expected[what][0]} on rank 0, {expected[what][1]} on rank 1")
        assert value == expected[what][rank], f"{what} is {value} on rank {rank}"
    for way in (x.tolist, x.numpy):
        try:
            way()
        except RuntimeError:
            continue
        raise AssertionError("tolist() and numpy() were refused")
    dist.destroy_process_group()


with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(work, (2, os.path.join(folder, "store")), nprocs=2, start_method="fork")
PYTHON
