#!/usr/bin/env bash
# torch 2.13.0: a scheduler made after the optimizer has been loaded leaves its rate too small, for good.
#
# Guess: the order in which a run is put together again is free, since both states are loaded: the schedule goes on
# where it was.
# Seen: to make a scheduler takes its first step. LinearLR and ConstantLR multiply the rate found in the optimizer (the
# loaded one) by their first factor and go on from there by factors; loading their state corrects nothing. After a
# warm-up from 0.1 the rate is a tenth of what it was, to the end, also in a SequentialLR or ChainedScheduler with
# others that follow. Right after loading `get_last_lr()` still tells the right one. CosineAnnealingLR, ExponentialLR
# and StepLR are not hurt, LambdaLR for one step.
#
# Run: findings/scheduler_made_after_loading_scales_twice.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy

import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    SequentialLR,
    StepLR,
)

weight = torch.nn.Parameter(torch.ones(1))
kinds = {
    "LinearLR": (lambda o: LinearLR(o, 0.1, 1.0, 4), 0.1),
    "ConstantLR": (lambda o: ConstantLR(o, 0.5, 3), 0.5),
    "SequentialLR": (lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, 4), CosineAnnealingLR(o, 20)], [4]), 0.1),
    "ChainedScheduler": (lambda o: ChainedScheduler([LinearLR(o, 0.1, 1.0, 4), ExponentialLR(o, 0.9)]), 0.1),
    "CosineAnnealingLR": (lambda o: CosineAnnealingLR(o, 20), 1.0),
    "ExponentialLR": (lambda o: ExponentialLR(o, 0.9), 1.0),
    "StepLR": (lambda o: StepLR(o, 3, 0.5), 1.0),
    "LambdaLR": (lambda o: LambdaLR(o, lambda epoch: 0.9**epoch), 1.0),
}


def run(optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    return optimizer.param_groups[0]["lr"]


def make():
    return torch.optim.SGD([weight], lr=1.0)


for name, (kind, share) in kinds.items():
    optimizer = make()
    scheduler = kind(optimizer)
    run(optimizer, scheduler, 6)
    states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    expected = run(optimizer, scheduler, 6)
    seen = {}
    for loaded_first in (False, True):
        optimizer = make()
        if loaded_first:
            optimizer.load_state_dict(copy.deepcopy(states[0]))
        scheduler = kind(optimizer)
        if not loaded_first:
            optimizer.load_state_dict(copy.deepcopy(states[0]))
        scheduler.load_state_dict(copy.deepcopy(states[1]))
        if name in ("LinearLR", "ConstantLR"):
            assert abs(scheduler.get_last_lr()[0] - 1.0) < 1e-9, "right, until the next step"
        seen[loaded_first] = run(optimizer, scheduler, 6)
    print(
        f"{name}: {expected:.4f} after 12 steps; resumed with the scheduler made first {seen[False]:.4f}, "
        f"with the optimizer loaded first {seen[True]:.4f}"
    )
    assert abs(seen[False] - expected) < 1e-9, name
    assert abs(seen[True] / expected - share) < 0.01, name
PYTHON
