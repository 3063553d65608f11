#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint loads a tensor into one of any other type, without a word.
#
# Guess: shapes are checked, so types are too; a float32 state does not load into integers, and a float64 counter
# keeps its value or is refused.
# Seen: shapes that differ raise, types that differ are converted as `copy_` does: 16777217 (float64) arrives as
# 16777216 in float32 and as 1 in uint8, fractions are cut off in int64, and everything but 0 is True in bool. Metadata
# has the types (`read_metadata`), so a loader that minds can compare them first.
#
# Run: findings/dcp_loading_casts_without_a_word.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
FOLDER=$folder "$folder/venv/bin/python" -W error::RuntimeWarning -W error::FutureWarning - <<'PYTHON'
import os

import torch
import torch.distributed.checkpoint as dcp

path = os.path.join(os.environ["FOLDER"], "checkpoint")
dcp.save({"count": torch.tensor([2**24 + 1.0], dtype=torch.float64), "part": torch.tensor([1.7, -2.7, 0.0])}, checkpoint_id=path)


def loaded(name, dtype):
    length = 1 if name == "count" else 3
    state = {name: torch.zeros(length, dtype=dtype)}
    dcp.load(state, checkpoint_id=path)
    return state[name].tolist()


seen = {
    "count into float32": (loaded("count", torch.float32), [16777216.0]),
    "count into uint8": (loaded("count", torch.uint8), [1]),
    "part into int64": (loaded("part", torch.int64), [1, -2, 0]),
    "part into bool": (loaded("part", torch.bool), [True, True, False]),
}
for what, (value, expected) in seen.items():
    print(f"{what}: {value}")
    assert value == expected, f"{expected} was seen"
try:
    dcp.load({"part": torch.zeros(2)}, checkpoint_id=path)
except BaseException as error:  # it is no Exception
    print(f"another shape: {type(error).__name__}")
else:
    raise AssertionError("another shape was refused")
kept = dcp.FileSystemReader(path).read_metadata().state_dict_metadata["count"].properties.dtype
print(f"the metadata knows: {kept}")
assert kept is torch.float64
PYTHON
