#!/usr/bin/env bash
# torch 2.13.0: an AveragedModel with `use_buffers=True` never counts beyond 1.
#
# Guess: running statistics are averaged and counts are left alone or copied, so that the averaged module can be trained
# on as the original.
# Seen: integer buffers go through the same formula, and what is behind the point is cut off at each update: after 200
# updates BatchNorm's `num_batches_tracked` is 1, where the original has 200. With `momentum=None`, where the next batch
# weighs 1/count, a new batch is then half of the running mean instead of 1/201. `get_swa_multi_avg_fn()`, the same
# average in its fast form, raises a RuntimeError ("Integer division") at the second update instead.
#
# Run: findings/averaged_model_stops_counting.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn


def average(**options):
    torch.manual_seed(0)
    module = torch.nn.BatchNorm1d(2, momentum=None)
    averaged = AveragedModel(module, use_buffers=True, **options)
    for _ in range(200):
        module(torch.randn(8, 2))
        averaged.update_parameters(module)
    return module, averaged.module


module, averaged = average()
print(f"batches: {module.num_batches_tracked.item()}, in the averaged module {averaged.num_batches_tracked.item()}")
assert (module.num_batches_tracked.item(), averaged.num_batches_tracked.item()) == (200, 1)
for each in (module, averaged.train()):
    each(torch.full((8, 2), 100.0))
means = module.running_mean[0].item(), averaged.running_mean[0].item()
print(f"running mean after one batch of 100s: {means[0]:.2f}, in the averaged module {means[1]:.2f}")
assert means[0] < 1 and means[1] > 45
try:
    average(multi_avg_fn=get_swa_multi_avg_fn())
except RuntimeError as error:
    print(f"get_swa_multi_avg_fn: {str(error)[:40]}")
else:
    raise AssertionError("get_swa_multi_avg_fn raised")
PYTHON
