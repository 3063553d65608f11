#!/usr/bin/env bash
# torchmetrics 1.9.0: a metric that stands twice in an expression is updated twice; a reset MinMaxMetric remembers.
#
# Guess: `total + total` of a SumMetric that saw 1 is 2; 2pr / (p + r) updates p and r once a batch.
# `MinMaxMetric.reset` goes back to no minimum and maximum, as its docstring says.
# Seen: each side of an operator passes `update` on, so what stands on both sides gets every batch twice: the sum is 4,
# counts and memory of list states are doubled. `forward` gives 2 for the same batch. Averages hide it. After
# MinMaxMetric.reset() the minimum of the epoch before is still the minimum, with `update` and `compute`.
#
# Run: findings/torchmetrics_updates_twice_in_an_expression.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torchmetrics import CatMetric, MeanMetric, SumMetric
from torchmetrics.wrappers import MinMaxMetric

total = SumMetric()
twice = total + total
twice.update(1.0)
print(f"total + total after 1: {twice.compute().item()}, total {total.compute().item()}")
assert (twice.compute().item(), total.compute().item()) == (4.0, 2.0)
twice.reset()
print(f"as forward: {twice(1.0).item()}, then compute: {twice.compute().item()}")
total = SumMetric()
other = SumMetric()
ratio = 2 * total * other / (total + other)
for value in (1.0, 2.0):
    ratio.update(value)
print(f"2ab / (a + b) after 1 and 2: {ratio.compute().item()}, with 3 each it is 3")
assert ratio.compute().item() == 6.0
values = CatMetric()
(values * values).update(1.0)
assert values.compute().tolist() == [1.0, 1.0]

bounds = MinMaxMetric(MeanMetric())
for epoch in ((1.0, 5.0), (3.0,)):
    for value in epoch:
        bounds.update(value)
        bounds.compute()
    seen = {name: value.item() for name, value in bounds.compute().items()}
    print(f"bounds after {epoch}: {seen}")
    bounds.reset()
assert seen == {"raw": 3.0, "max": 3.0, "min": 1.0}, seen
PYTHON
