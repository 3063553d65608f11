#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint does not fill a tensor whose entry was saved as a Python number.
#
# Guess: a tensor given to `load` is filled in place or there is an error, since "in place" is how loading is
# documented, and since the reverse (a number where a tensor was saved) is refused.
# Seen: nothing is said: the entry in the dict is replaced by the number; the tensor, which is what the module or
# optimizer holds, keeps its value. So a step counter or scale that was a float when saved and is a buffer today loads
# "fine" and stays at its initial value. Lists and None replace a tensor alike.
#
# Run: findings/dcp_does_not_fill_a_tensor_from_a_number.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
FOLDER=$folder "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os

import torch
import torch.distributed.checkpoint as dcp

path = os.path.join(os.environ["FOLDER"], "checkpoint")
dcp.save({"scale": 1.5, "nothing": None, "list": [1, 2], "part": torch.ones(1)}, checkpoint_id=path)
buffers = {name: torch.zeros(1) for name in ("scale", "nothing", "list", "part")}
state = dict(buffers)
dcp.load(state, checkpoint_id=path)
print(f"state after loading: {state}")
print(f"the tensors that were given: {buffers}")
assert state["scale"] == 1.5 and state["nothing"] is None and state["list"] == [1, 2]
assert [buffers[name].item() for name in ("scale", "nothing", "list")] == [0.0, 0.0, 0.0], "none was filled"
assert buffers["part"].item() == 1.0 and state["part"] is buffers["part"]
try:
    dcp.load({"part": 0.0}, checkpoint_id=path)
except BaseException as error:  # it is no Exception
    print(f"the reverse: {type(error.failures[0][0]).__name__}")
else:
    raise AssertionError("a number where a tensor was saved was refused")
PYTHON
