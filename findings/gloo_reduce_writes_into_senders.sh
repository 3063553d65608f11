#!/usr/bin/env bash
# torch 2.13.0, gloo: dist.reduce leaves half-made sums in the tensors of the ranks that only send.
#
# Guess: "only the process with rank dst receives the final result", so the others' tensors are as they were.
# Seen: they are used as scratch. With two ranks the second half of the sender's tensor is the sum already, the first
# half its own; with three there are sums of two, too. A sender that goes on with its own value (its local loss, its
# count) computes with a mixture.
#
# Run: findings/gloo_reduce_writes_into_senders.sh    Fails if this changes.
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


def work(rank, ranks, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    mine = torch.arange(8.0)
    seen = mine.clone()
    dist.reduce(seen, 0)
    everywhere = [torch.zeros(8) for _ in range(ranks)]
    dist.all_gather(everywhere, seen)
    if rank == 0:
        for each, tensor in enumerate(everywhere):
            print(f"{ranks} ranks, all with {mine.int().tolist()}: rank {each} has {tensor.int().tolist()}")
    parts = [(tensor / mine)[1:].int().tolist() for tensor in everywhere]
    assert parts[0] == [ranks] * 7
    assert parts[1] == ([1, 1, 1, 2, 2, 2, 2] if ranks == 2 else [2, 2, 2, 3, 3, 3, 3]), parts
    assert ranks == 2 or parts[2] == [1, 1, 1, 2, 2, 2, 2], parts
    dist.destroy_process_group()


for ranks in (2, 3):
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (ranks, os.path.join(folder, "store")), nprocs=ranks, start_method="fork")
PYTHON
