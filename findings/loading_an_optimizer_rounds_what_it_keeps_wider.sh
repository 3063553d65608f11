#!/usr/bin/env bash
# torch 2.13.0: load_state_dict of an optimizer casts its state to the type of the weights, also what was wider on purpose.
#
# Guess: a state that is saved and loaded in one process is the same state. Only `step` is known to be an exception, and is
# left as it is.
# Seen: NAdam keeps a product of all its momentum factors in float32, whatever the weights are. With bfloat16 weights it
# comes back in bfloat16, two digits of it, and is used and multiplied on in that; with float64 weights in float64. So a
# run that goes on differs from one that was not interrupted, with no message. The same happens to any optimizer that has
# moments in float32 for weights in bfloat16.
#
# Run: findings/loading_an_optimizer_rounds_what_it_keeps_wider.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy

import torch


def train(weight, optimizer, steps):
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()


for dtype in (torch.bfloat16, torch.float32, torch.float64):
    weight = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = torch.optim.NAdam([weight], lr=0.01)
    train(weight, optimizer, 5)
    other = torch.nn.Parameter(weight.detach().clone())
    resumed = torch.optim.NAdam([other], lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before, after = (o.state[w]["mu_product"] for o, w in ((optimizer, weight), (resumed, other)))
    print(f"weights in {dtype}: mu_product {before.item():.9f} ({before.dtype}) -> {after.item():.9f} ({after.dtype})")
    assert before.dtype == torch.float32 and after.dtype == dtype
    assert (before.item() == after.item()) is (dtype is not torch.bfloat16)
PYTHON
