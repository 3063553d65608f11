#!/usr/bin/env bash
# webdataset 1.0.2: `.shuffle(n)` heeds no seed but its own: two runs of one script are in different orders.
#
# Guess: samples are shuffled by Python's `random` (or torch's generator), as shards' seed is drawn from it, so that a
# script that seeds both gives the same order each time, and so does `WebDataset(..., seed=...)`.
# Seen: without `rng=` or `seed=` of its own, `shuffle` makes a generator from process and clock. Neither global seeds nor
# the dataset's matter, so that a run can be neither repeated nor resumed. With `seed=` each epoch has the same order;
# with `rng=random.Random(1)` epochs differ, and runs are the same.
#
# Run: findings/webdataset_shuffles_by_the_clock.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 webdataset==1.0.2
FOLDER=$folder "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os
import random

import torch
import webdataset

folder = os.environ["FOLDER"]
for shard in range(2):
    with webdataset.TarWriter(f"{folder}/shard-{shard}.tar") as sink:
        for sample in range(50):
            sink.write({"__key__": f"{shard}-{sample}", "cls": 50 * shard + sample})


def run(**options):
    random.seed(0)
    torch.manual_seed(0)
    dataset = webdataset.WebDataset(f"{folder}/shard-{{0..1}}.tar", shardshuffle=False, seed=0)
    dataset = dataset.shuffle(50, **options).decode()
    return [[sample["cls"] for sample in dataset] for _ in range(2)]


for name, options in (("shuffle(50)", dict), ("seed=1", lambda: {"seed": 1}), ("rng=", lambda: {"rng": random.Random(1)})):
    first, second = run(**options()), run(**options())
    same, alike = first == second, first[0] == first[1]
    print(f"{name}: two seeded runs are the same: {same}; two epochs are: {alike}")
    assert (same, alike) == {"shuffle(50)": (False, False), "seed=1": (True, True), "rng=": (True, False)}[name]
PYTHON
