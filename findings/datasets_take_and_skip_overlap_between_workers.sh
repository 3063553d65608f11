#!/usr/bin/env bash
# datasets 5.2.0: `take(n)` and `skip(n)` of a streamed dataset are other rows with loader workers, and may overlap.
#
# Guess: `take(8)` is the first 8 rows and `skip(8)` the rest, for training and validation, however each is read.
# Seen: with two workers, or two nodes of `split_dataset_by_node`, it is the first 4 rows of each one's shards: rows 0-3
# and 6-9 or others. As long as both are read alike they have no row in common. A validation set read in process (usual,
# it is small) and a training set read by two workers share rows, and some rows are in neither; no warning.
#
# Run: findings/datasets_take_and_skip_overlap_between_workers.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 datasets==5.2.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from datasets import Dataset
from datasets.distributed import split_dataset_by_node

rows = Dataset.from_dict({"x": list(range(24))}).to_iterable_dataset(num_shards=4).with_format("torch")


def read(part, workers):
    return sorted(int(row["x"]) for row in torch.utils.data.DataLoader(part, batch_size=None, num_workers=workers))


for taken, skipped in ((0, 0), (2, 2), (0, 2)):
    validation, training = read(rows.take(8), taken), read(rows.skip(8), skipped)
    both, neither = sorted({*validation} & {*training}), sorted({*range(24)} - {*validation} - {*training})
    print(f"take with {taken} workers: {validation}; skip with {skipped}: {len(training)} rows")
    print(f"  in both {both}, in neither {neither}")
    assert validation == ([*range(8)] if taken == 0 else [0, 1, 2, 3, 6, 7, 8, 9])
    assert bool(both) == bool(neither) == (taken != skipped)
nodes = [read(split_dataset_by_node(rows.take(8), node, 2), 0) for node in range(2)]
print(f"take(8) on two nodes: {nodes}")
assert nodes == [[0, 1, 2, 3], [6, 7, 8, 9]]
PYTHON
