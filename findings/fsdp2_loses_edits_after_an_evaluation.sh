#!/usr/bin/env bash
# torch 2.13.0: after a forward pass without gradients, what is done to the parameters of a fully_shard root gets lost.
#
# Guess: between forward passes parameters are shards, as `state_dict()` has them; editing them in place (clamping,
# copying in averaged weights, freezing) works as it did before the first forward.
# Seen: the root's own parameters stay gathered after a forward pass in no_grad (by default the root is not resharded
# after forward): `module.bias` is a plain Parameter of full shape. Adding 5 to it changes the next output, and is gone
# with the next reshard: after a backward pass, or after `state_dict()`, which has the old values.
# `requires_grad_(False)` is lost as well. After `module.reshard()` both work.
#
# Run: findings/fsdp2_loses_edits_after_an_evaluation.sh    Fails if this changes.
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
from torch.distributed.tensor import DTensor, init_device_mesh


def work(rank, ranks, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    batch = torch.ones(2, 4)
    for reshard in (False, True):
        module = fully_shard(nn.Linear(4, 2), mesh=mesh)
        old = module.bias.full_tensor().detach().clone()
        with torch.no_grad():
            before = module(batch)
            if reshard:
                module.reshard()
            sharded = isinstance(module.bias, DTensor)
            module.bias.add_(5)
            at_once = round((module(batch) - before).mean().item())
            saved = round((module.state_dict()["bias"].full_tensor() - old).mean().item())
            later = round((module(batch) - before).mean().item())
        module = fully_shard(nn.Linear(4, 2), mesh=mesh)
        with torch.no_grad():
            module(batch)
        if reshard:
            module.reshard()
        module.weight.requires_grad_(False)
        frozen = []
        for _ in range(2):
            module.zero_grad()
            module(batch).sum().backward()
            frozen.append(module.weight.grad is None)
        if rank == 0:
            print(
                f"reshard() {reshard}: 5 added to the bias are {at_once} at once, {saved} in the state and {later} after it "
                f"was asked for; a frozen weight stays without a gradient: {frozen}"
            )
        assert sharded == reshard and at_once == 5
        assert saved == later == (5 if reshard else 0)
        assert frozen[-1] == reshard
    dist.destroy_process_group()


with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(work, (2, os.path.join(folder, "store")), nprocs=2, start_method="fork")
PYTHON
