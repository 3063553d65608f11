#!/usr/bin/env bash
# torch 2.13.0: in a second process group, operations on DTensors give results on the mesh of the first one.
#
# Guess: `destroy_process_group` and `init_process_group` begin anew, as elastic training in one process does: a DTensor
# that is made on a new mesh has nothing to do with the mesh of before.
# Seen: which mesh and placements an operation's result has is remembered by the arguments' meshes, and meshes are equal
# if they have the same ranks and names, whatever their groups. So the result is on the old mesh; whatever reduces it
# looks for the old mesh's groups by name. Names begin anew with each process group: a worker that has another rank now
# is in no group of that name, as here, or in one where others do not come, and waits for them until the timeout. Two
# private functions of torch.distributed.tensor.debug forget it, the second one for the calling thread alone.
#
# Run: findings/dtensor_remembers_meshes_of_destroyed_groups.sh    Fails if this changes.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import _clear_fast_path_sharding_prop_cache, _clear_python_sharding_prop_cache


def norm(path, rank, ranks):
    """Of four ones, in copies on two pairs of workers, each of which has shards."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    ones = distribute_tensor(torch.ones(4), mesh, [Replicate(), Shard(0)], src_data_rank=None)
    found = torch.linalg.vector_norm(ones)
    try:
        return f"{found.full_tensor().item():.3f}", found.device_mesh is mesh
    except RuntimeError as error:
        return str(error).split(" under")[0], found.device_mesh is mesh
    finally:
        dist.destroy_process_group()


def work(rank, ranks, folder):
    torch.set_num_threads(1)
    first = norm(f"{folder}/first", rank, ranks)
    second = norm(f"{folder}/second", ranks - 1 - rank, ranks)
    _clear_python_sharding_prop_cache()
    _clear_fast_path_sharding_prop_cache()
    third = norm(f"{folder}/third", ranks - 1 - rank, ranks)
    if rank == 0:
        print(f"first group: {first}\nsecond: {second}\nthird, what is remembered being cleared: {third}")
    assert first == third == ("2.000", True)
    assert second == ("Could not resolve the process group registered", False)


with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(work, (4, folder), nprocs=4, start_method="fork")
PYTHON
