#!/usr/bin/env bash
# torch 2.13.0: an optimizer given its learning rate as a tensor has one rate for all groups, whatever schedulers say.
#
# Guess: `lr=torch.tensor(0.1)` (what `capturable` and torch.compile ask for) behaves as 0.1.
# Seen: every group that names no rate of its own holds the very same tensor, and schedulers write into it. LambdaLR
# with a lambda for each group leaves both at the last one's; ReduceLROnPlateau cuts once for each group, so at the
# first bad epoch two groups go from 1 to 0.01 (factor 0.1) instead of 0.1. The tensor is also the caller's own, and the
# one in a `state_dict()` taken earlier: both follow every later change, so two optimizers made from one variable share
# a rate, and a state kept in memory "returns" to the newest rate.
#
# Run: findings/tensor_learning_rate_is_shared_by_groups.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, ReduceLROnPlateau

weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]


def optimizer(rate):
    return torch.optim.Adam([{"params": [weight]} for weight in weights], lr=rate)


def rates(optimizer):
    return [round(float(group["lr"]), 6) for group in optimizer.param_groups]


seen = {}
for name, rate in (("float", 1.0), ("tensor", torch.tensor(1.0))):
    one = optimizer(rate)
    LambdaLR(one, [lambda epoch: 1.0, lambda epoch: 0.1])
    two = optimizer(1.0 if name == "float" else torch.tensor(1.0))
    plateau = ReduceLROnPlateau(two, patience=0, factor=0.1)
    plateau.step(1.0)
    plateau.step(2.0)
    seen[name] = rates(one), rates(two)
    print(f"{name}: LambdaLR (1, 0.1) gives {seen[name][0]}, one cut of ReduceLROnPlateau {seen[name][1]}")
assert seen["float"] == ([1.0, 0.1], [0.1, 0.1])
assert seen["tensor"] == ([0.1, 0.1], [0.01, 0.01])

rate = torch.tensor(1.0)
first, second = torch.optim.Adam(weights[:1], lr=rate), torch.optim.Adam(weights[1:], lr=rate)
state = first.state_dict()
scheduler = ExponentialLR(first, 0.5)
first.step()
scheduler.step()
kept = state["param_groups"][0]["lr"].item()
print(
    f"after a step of ExponentialLR: variable {rate.item()}, other optimizer {rates(second)}, state kept before {kept}"
)
assert rate.item() == 0.5 and rates(second) == [0.5] and kept == 0.5
PYTHON
