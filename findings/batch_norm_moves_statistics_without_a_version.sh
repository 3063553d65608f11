#!/usr/bin/env bash
# torch 2.13.0: batch normalisation changes its running statistics, and their `_version` stays as it was.
#
# Guess: what changes a tensor in place raises its version; that is how autograd, and who keeps copies of a state (a
# checkpoint that skips what has not changed, a second pass of activation checkpointing that looks for buffers that the
# first one changed), sees it. `num_batches_tracked`, which is beside them, does rise.
# Seen: `running_mean` and `running_var` have other numbers after each batch, and the same version, by `nn.BatchNorm1d`
# and by `F.batch_norm`; by `F.instance_norm` it rises. So autograd does not notice that a loss was computed from
# statistics that have changed since: its gradient is of the new ones, without the error that an `add_` raises.
#
# Run: findings/batch_norm_moves_statistics_without_a_version.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
x = torch.randn(8, 3)


def seen(name, statistics, update):
    before, version = statistics.clone(), statistics._version
    update()
    changed, rises = not torch.equal(before, statistics), statistics._version > version
    print(f"{name:40}changed: {changed}, version rises: {rises}")
    return changed, rises


norm = nn.BatchNorm1d(3)
found = [
    seen("BatchNorm1d, running_mean", norm.running_mean, lambda: norm(x)),
    seen("BatchNorm1d, running_var", norm.running_var, lambda: norm(x)),
    seen("F.batch_norm", mean := torch.zeros(3), lambda: F.batch_norm(x, mean, torch.ones(3), training=True)),
    seen("F.instance_norm", mean := torch.zeros(3), lambda: F.instance_norm(torch.randn(8, 3, 5), mean, torch.ones(3))),
]
assert found == [(True, False)] * 3 + [(True, True)], found
assert seen("num_batches_tracked", norm.num_batches_tracked, lambda: norm(x)) == (True, True)
assert seen("add_", norm.running_mean, lambda: norm.running_mean.add_(1.0)) == (True, True)


def gradient(change):
    weight, statistics = torch.ones(3, requires_grad=True), torch.ones(3)
    loss = (weight * statistics).sum()
    change(statistics)
    try:
        loss.backward()
    except RuntimeError:
        return "an error"
    return weight.grad


of_norm = gradient(lambda s: F.batch_norm(x, s, torch.ones(3), training=True, momentum=0.5))
of_add = gradient(lambda s: s.add_(1.0))
print("gradient (1 by the loss that was computed):", of_norm, "| after add_:", of_add)
assert of_add == "an error" and not torch.equal(of_norm, torch.ones(3)), (of_norm, of_add)
PYTHON
