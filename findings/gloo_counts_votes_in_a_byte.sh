#!/usr/bin/env bash
# torch 2.13.0: `all_reduce` of bools on gloo adds their bytes, so that 256 votes for True are False.
#
# Guess: a sum of bools is "any of them", as on NCCL, for which torch takes the maximum instead; or an error.
# Seen: the sum is a tensor of dtype bool with 2, 3, ... in its bytes. It prints as True, compares as True, and its bytes
# become 1 in a copy, so nothing shows until the byte overflows: True from each of 256 workers is False, and so is one
# tensor that is reduced eight times over two workers, as a stop flag that is kept may be. `ReduceOp.MAX` is right.
#
# Run: findings/gloo_counts_votes_in_a_byte.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/votes.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def vote(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, right in (("SUM", False), ("MAX", True)):
        stop, seen = torch.tensor([True]), []
        for _ in range(8):
            dist.all_reduce(stop, getattr(dist.ReduceOp, name))
            seen.append((stop.item(), stop.view(torch.uint8).item()))
        if rank == 0:
            print(f"{name} over two workers, eight times: {seen}")
        assert [flag for flag, _ in seen] == [True] * 7 + [right]
        assert [byte for _, byte in seen] == ([1] * 8 if right else [2, 4, 8, 16, 32, 64, 128, 0])
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(vote, (sys.argv[1],), 2)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/votes.py" "$folder/store"
