#!/usr/bin/env bash
# torch 2.13.0: ZeroRedundancyOptimizer, given groups as every other optimizer takes them, trains nothing.
#
# Guess: `[{"params": model.body.parameters()}, {"params": model.head.parameters(), "lr": 0.01}]` is what the docs of
# torch.optim show for groups, so the optimizer that wraps others takes it, or says that it wants lists.
# Seen: `parameters()` is an iterator, which checking the arguments uses up. The groups that are left are empty: `step`
# does nothing, the loss stays where it was, a scheduler counts, `state_dict` saves and loads, and no message is given.
# With `list(...)` around each it trains as SGD does.
#
# Run: findings/zero_redundancy_optimizer_trains_nothing.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer


def work(rank, ranks, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    for name, parameters in {
        "parameters()": lambda part: part.parameters(),
        "list": lambda part: [*part.parameters()],
    }.items():
        moved = {}
        for kind in (torch.optim.SGD, ZeroRedundancyOptimizer):
            module = copy.deepcopy(start)
            groups = [{"params": parameters(module[0])}, {"params": parameters(module[1]), "lr": 0.01}]
            options = {} if kind is torch.optim.SGD else {"optimizer_class": torch.optim.SGD}
            optimizer = kind(groups, lr=0.1, **options)
            module(torch.ones(2, 4)).pow(2).mean().backward()
            optimizer.step()
            moved[kind] = [(p - q).abs().max().item() for p, q in zip(module.parameters(), start.parameters())]
            if rank == 0:
                print(f"{name}, {kind.__name__}: weights moved by {max(moved[kind]):.4f}")
        assert max(moved[torch.optim.SGD]) > 0.01
        if name == "list":
            assert moved[ZeroRedundancyOptimizer] == moved[torch.optim.SGD]
        else:
            assert set(moved[ZeroRedundancyOptimizer]) == {0.0}, moved
            assert [len(group["params"]) for group in optimizer.param_groups] == [0, 0]
    dist.destroy_process_group()


with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(work, (2, os.path.join(folder, "store")), nprocs=2, start_method="fork")
PYTHON
