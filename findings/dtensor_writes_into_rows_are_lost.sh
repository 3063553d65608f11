#!/usr/bin/env bash
# torch 2.13.0: what is written into some rows of an FSDP2 weight is lost without a word.
#
# Guess: `weight[0].zero_()` and `init.constant_(weight[:2], 9.0)` change the weight, as they do before `fully_shard`, or
# raise: DTensors refuse what they cannot do, and `weight[0] = 9.0` is refused indeed.
# Seen: what is cut along the shards is gathered first, so that the result is a copy, although torch's autograd takes it
# for a view (the weight's `_version` rises). Writes into it go nowhere, in place on a row, on a slice, on a `chunk` (a
# third of a fused projection that is to be initialised), on `T[:, 0]`, on `diagonal()`, and by `weight[0] = weight[1]`.
# Also where all rows that are asked for are on one rank, and make up what it has. Columns,
# masks and the whole are changed as they should be.
#
# Run: findings/dtensor_writes_into_rows_are_lost.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

WRITES = {
    "weight[0].zero_()": lambda weight: weight[0].zero_(),
    "init.constant_(weight[:2], 9.0)": lambda weight: nn.init.constant_(weight[:2], 9.0),
    "weight[:3].mul_(2)": lambda weight: weight[:3].mul_(2),  # all of rank 0's rows, and no others
    "weight.chunk(3)[1].fill_(9.0)": lambda weight: weight.chunk(3)[1].fill_(9.0),
    "weight.T[:, 0].fill_(9.0)": lambda weight: weight.T[:, 0].fill_(9.0),
    "weight.diagonal().fill_(9.0)": lambda weight: weight.diagonal().fill_(9.0),
    "weight[0] = weight[1]": lambda weight: weight.__setitem__(0, weight[1]),
    "weight.data[0].sub_(1.0)": lambda weight: weight.data[0].sub_(1.0),
    "weight[0] = 9.0": lambda weight: weight.__setitem__(0, 9.0),
    "weight[:, 0].fill_(9.0)": lambda weight: weight[:, 0].fill_(9.0),
    "weight.masked_fill_(weight > 0, 9.0)": lambda weight: weight.masked_fill_(weight > 0, 9.0),
}


@torch.no_grad()
def outcome(write):
    torch.manual_seed(0)
    module = nn.Linear(4, 6, bias=False)
    before, wanted = module.weight.clone(), module.weight.clone()
    write(wanted)
    weight = fully_shard(module).weight
    version = weight._version
    try:
        write(weight)
    except NotImplementedError:
        return "refused"
    found = weight.full_tensor()
    if torch.equal(found, wanted):
        return "written"
    assert torch.equal(found, before)
    return "lost, version rises" if weight._version > version else "lost"


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: outcome(write) for name, write in WRITES.items()}
    if rank == 0:
        print("\n".join(f"{name:40}{what}" for name, what in found.items()))
    names = list(WRITES)
    assert all(found[name] == "lost, version rises" for name in names[:7]), found
    assert [found[name] for name in names[7:]] == ["lost", "refused", "written", "written"], found
    dist.destroy_process_group()


with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(work, (folder,), nprocs=2, start_method="fork")
PYTHON
