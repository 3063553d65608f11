#!/usr/bin/env bash
# torch 2.13.0: reading the state of an optimizer that has not stepped yet makes its first step another one.
#
# Guess: `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` only reads, so that training goes on as it
# would have without.
# Seen: where an optimizer has no state, it is made by a step with zero gradients and a rate of zero. Weights stay, but
# what the optimizer counts does not: AdamW's and Adam's first real update is 0.744 of what it would have been (the
# bias correction is that of a second step), Adamax's 0.526, SGD's with dampening a half, Rprop's and ASGD's nothing at
# all. Hooks around `step` are called too, so a counter of steps is one ahead. SGD (without dampening) and RMSprop are
# as before in their weights; only Adagrad, which has its state from the start, takes no step. So a checkpoint at step
# 0, or a state read to have something to load into, is not harmless.
#
# Run: findings/dcp_reading_an_optimizer_changes_its_first_step.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

seen = []


def first_update(kind, read, options):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 2)
    optimizer = kind(module.parameters(), lr=0.1, **options)
    before = module.weight.detach().clone()
    if read:
        hook = optimizer.register_step_post_hook(lambda *arguments: seen.append(kind.__name__))
        get_optimizer_state_dict(module, optimizer)
        hook.remove()
        assert torch.equal(module.weight, before), "the weights have moved"
    module(torch.ones(3, 4)).pow(2).sum().backward()
    optimizer.step()
    return (module.weight - before).abs().max().item()


optim = torch.optim
expected = {
    "AdamW": (optim.AdamW, {"weight_decay": 0.0}, 0.744),
    "Adam": (optim.Adam, {}, 0.744),
    "NAdam": (optim.NAdam, {}, 0.989),
    "Adamax": (optim.Adamax, {}, 0.526),
    "RAdam": (optim.RAdam, {}, 0.526),
    "SGD, dampened": (optim.SGD, {"momentum": 0.9, "dampening": 0.5}, 0.5),
    "SGD, momentum": (optim.SGD, {"momentum": 0.9}, 1.0),
    "RMSprop": (optim.RMSprop, {}, 1.0),
    "Adagrad": (optim.Adagrad, {}, 1.0),
    "Rprop": (optim.Rprop, {}, 0.0),
    "ASGD": (optim.ASGD, {}, 0.0),
}
for name, (kind, options, share) in expected.items():
    plain, after = first_update(kind, False, options), first_update(kind, True, options)
    print(f"{name:14} first update {plain:.5f}, after reading {after:.5f}: {after / plain:.3f} of it")
    assert abs(after / plain - share) < 0.001, f"{name}: {share} was seen"
assert len(seen) == len(expected) - 1, f"step hooks were called {len(seen)} times while reading"
assert "Adagrad" not in seen
print(f"step hooks called while reading: {len(seen)}, once for each optimizer but Adagrad")
PYTHON
