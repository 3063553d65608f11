#!/usr/bin/env bash
# torch 2.13.0, gloo: all_reduce with MAX or MIN keeps the NaN of one rank and loses that of another.
#
# Guess: as `torch.amax` over all ranks' values, which is NaN if one of them is, so that a worst loss, or a flag made of
# one, tells every rank of a NaN.
# Seen: of single numbers a NaN on rank 0 reaches all, and one on rank 1 none; they get the largest of the rest. Of 64
# numbers that are all NaN on rank 1, the first half comes back as rank 0's and the second as NaN: which order the two
# are compared in depends on the place in the tensor. The result is the same on all ranks, so nobody sees it. SUM and
# AVG keep every NaN.
#
# Run: findings/gloo_max_keeps_or_loses_nan.sh    Fails if this changes.
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

nan = float("nan")


def work(rank, ranks, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    for name, whole, kind in (
        ("MAX", torch.amax, dist.ReduceOp.MAX),
        ("MIN", torch.amin, dist.ReduceOp.MIN),
        ("SUM", torch.sum, dist.ReduceOp.SUM),
        ("AVG", torch.mean, dist.ReduceOp.AVG),
    ):
        seen = {}
        for hurt in range(ranks):
            values = torch.tensor([nan if each == hurt else float(each) for each in range(ranks)])
            assert whole(values, 0).isnan(), "in one process it is NaN"
            one, many = values[rank].reshape(1), values[rank].repeat(64)
            dist.all_reduce(one, kind)
            dist.all_reduce(many, kind)
            seen[hurt] = [bool(one.isnan()), int(many.isnan().sum()), bool(many[0].isnan()), bool(many[-1].isnan())]
        if rank == 0:
            print(
                f"{name}: NaN on rank 0 {'reaches all' if seen[0][0] else 'is lost'}, on rank 1 "
                f"{'reaches all' if seen[1][0] else 'is lost'}; of 64 on rank 1 {seen[1][1]} are left"
            )
        if name in ("SUM", "AVG"):
            assert seen[0] == seen[1] == [True, 64, True, True], seen
        else:
            assert seen[0][0] and not seen[1][0], seen
            assert seen[1][1:] == [32, False, True], seen
    dist.destroy_process_group()


with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(work, (2, os.path.join(folder, "store")), nprocs=2, start_method="fork")
PYTHON
