#!/usr/bin/env bash
# torchmetrics 1.9.0: after `load_state_dict` or `merge_state` a metric may go on giving its old value.
#
# Guess: `compute` is of the state that the metric has; the value kept by `compute_with_cache` is dropped whenever that
# state changes.
# Seen: only `update`, `forward` and `reset` drop it. A metric that was computed once and is then given a checkpoint's
# state, or another metric's share, answers as before, without a warning, although its state is the new one. Besides,
# states that are lists are not copied when they are loaded: the next `forward` or `reset` empties the caller's
# checkpoint, so that loading it a second time (the next trial, a retry) gives a metric without its past.
#
# Run: findings/torchmetrics_answers_from_before.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy

import torch
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError


def metric(kind, *batches):
    made = kind()
    made.persistent(True)
    for batch in batches:
        made.update(*batch)
    return made


one, two = (torch.tensor([1.0]), torch.tensor([3.0])), (torch.tensor([1.0]), torch.tensor([7.0]))
for kind, first, second in ((MeanMetric, one[1:], two[1:]), (MeanSquaredError, one, two)):
    for asked in (False, True):
        loaded, merged = metric(kind, first), metric(kind, first)
        if asked:
            before = loaded.compute().item(), merged.compute().item()
        loaded.load_state_dict(metric(kind, second).state_dict())
        merged.merge_state(metric(kind, second))
        seen = loaded.compute().item(), merged.compute().item()
        right = metric(kind, second).compute().item(), metric(kind, first, second).compute().item()
        print(f"{kind.__name__}, computed before: {asked}. Loaded: {seen[0]}, merged: {seen[1]}; right are {right}")
        assert seen == (before if asked else right), (kind, asked)
        loaded._computed = merged._computed = None
        assert (loaded.compute().item(), merged.compute().item()) == right, "the state is right all the time"

checkpoint = copy.deepcopy(metric(CatMetric, (1.0,), (2.0,)).state_dict())
for attempt, expected in (("first", [1.0, 2.0, 5.0]), ("second", [5.0, 5.0])):
    resumed = metric(CatMetric)
    resumed.load_state_dict(checkpoint)
    resumed(5.0)
    print(f"{attempt} load, then 5: {resumed.compute().tolist()}; the checkpoint is {checkpoint} now")
    assert resumed.compute().tolist() == expected
PYTHON
