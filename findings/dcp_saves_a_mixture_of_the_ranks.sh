#!/usr/bin/env bash
# torch 2.13.0: a distributed checkpoint of plain tensors that differ between ranks is a mixture of the ranks'.
#
# Guess: a key that several ranks have is saved by rank 0, as is done with everything that is no tensor (and as files
# written by rank 0 would have it), or a copy that differs is refused.
# Seen: copies are not compared. Each key is written by the rank that has least to write so far, so of six tensors every
# second one is rank 1's, while numbers and objects are rank 0's; with another tensor in the state the rest is dealt out
# anew. What differs by rank on purpose (running statistics of BatchNorm, generators' states, a sampler's place) comes
# back as a state that no rank ever had. `DefaultSavePlanner(dedup_save_to_lowest_rank=True)` takes all of rank 0.
#
# Run: findings/dcp_saves_a_mixture_of_the_ranks.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
FOLDER=$folder "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp


def work(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    seen = {}
    for name, planner in {
        "default": dcp.DefaultSavePlanner(),
        "to the lowest rank": dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True),
    }.items():
        state = {f"part{i}": torch.full((10 + i,), float(rank)) for i in range(6)} | {"number": rank}
        path = os.path.join(folder, name)
        dcp.save(state, checkpoint_id=path, planner=planner)
        state = {key: torch.zeros_like(part) if torch.is_tensor(part) else part for key, part in state.items()}
        dcp.load(state, checkpoint_id=path)
        seen[name] = [int(part[0]) if torch.is_tensor(part) else part for part in state.values()]
        if rank == 0:
            print(f"{name}: parts from ranks {seen[name][:-1]}, the number from rank {seen[name][-1]}")
    assert set(seen["default"][:-1]) == {0, 1} and seen["default"][-1] == 0, seen
    assert set(seen["to the lowest rank"]) == {0}, seen
    dist.destroy_process_group()


mp.start_processes(work, (2, os.environ["FOLDER"]), nprocs=2, start_method="fork")
PYTHON
