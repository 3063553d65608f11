#!/usr/bin/env bash
# torch_geometric 2.8.1: batching adds to the numbers of any attribute with "index" or "batch" in its name.
#
# Guess: what refers to nodes (`edge_index`) is shifted, and what else a graph carries (an identifier, a label) is put
# together as it is.
# Seen: the name decides. `sample_index` of three graphs with the number 5 comes out of the DataLoader as 5, 8, 11 (3
# nodes each), `batch_number` as 5, 11, 17; `sample_id` as 5, 5, 5. Both are plain identifiers. So joining predictions
# to rows by such a number joins others, and lookups by it give other embeddings. `to_data_list()` takes it away again.
# (Attributes with "adj" in their name become a block diagonal only if they are sparse.)
#
# Run: findings/pyg_collation_changes_numbers_by_name.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 torch_geometric==2.8.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader


def graph():
    names = ("sample_index", "batch_number", "sample_id")
    return Data(x=torch.ones(3, 1), **{name: torch.tensor([5]) for name in names})


batch = next(iter(DataLoader([graph() for _ in range(3)], batch_size=3)))
for name, expected in (("sample_index", [5, 8, 11]), ("batch_number", [5, 11, 17]), ("sample_id", [5, 5, 5])):
    seen = batch[name].tolist()
    print(f"{name}: {seen}, 5 in each graph")
    assert seen == expected
assert [part.sample_index.item() for part in batch.to_data_list()] == [5, 5, 5]
PYTHON
