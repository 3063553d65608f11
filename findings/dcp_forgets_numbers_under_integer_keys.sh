#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint does not give back what is no tensor and lies under an integer key.
#
# Guess: a dict with integer keys (an optimizer's `state`, a table by epoch) comes back as it was, as one with strings
# does, or is refused when it is saved.
# Seen: tensors under such keys are filled. A number, string or list stays what it was in the state that was given to
# `load`, and the saved one is put beside it under the key as a string: {0: tensor, 1: 0, "1": 5} for a saved 5. So
# `MultiStepLR.state_dict()`, whose milestones are a Counter by epoch, has its old milestones and new ones that nothing
# reads; a state that a fresh optimizer has given, with its "step" as an int, keeps its 0.
#
# Run: findings/dcp_forgets_numbers_under_integer_keys.sh    Fails if this changes.
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
saved = {
    "table": {0: torch.tensor([3.0]), 1: 5, 2: "saved", 3: [1, 2]},
    "named": {"a": torch.tensor([3.0]), "b": 5},
    "state": {0: {"step": 7, "moment": torch.tensor([3.0])}},
}
dcp.save(saved, checkpoint_id=path)
state = {
    "table": {0: torch.zeros(1), 1: 0, 2: "mine", 3: [0]},
    "named": {"a": torch.zeros(1), "b": 0},
    "state": {0: {"step": 0, "moment": torch.zeros(1)}},
}
dcp.load(state, checkpoint_id=path)
for name, part in state.items():
    print(f"{name}: {part}")
assert state["named"] == {"a": torch.tensor([3.0]), "b": 5}
table = state["table"]
assert table[0] == torch.tensor([3.0]), "a tensor is filled"
assert (table[1], table[2], table[3]) == (0, "mine", [0]), "what is no tensor stays as it was"
assert (table["1"], table["2"], table["3"]) == (5, "saved", [1, 2]), "and comes under another key"
assert state["state"][0]["moment"] == torch.tensor([3.0])
assert state["state"][0]["step"] == 0 and state["state"]["0"] == {"step": 7}

parameter = torch.nn.Parameter(torch.ones(1))


def scheduler(milestones):
    return torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([parameter], lr=1.0), milestones)


dcp.save({"scheduler": scheduler([2, 5]).state_dict()}, checkpoint_id=path + "-scheduler")
state = {"scheduler": scheduler([2, 2, 5]).state_dict()}
dcp.load(state, checkpoint_id=path + "-scheduler")
print(f"milestones: {dict(state['scheduler']['milestones'])}, saved were {{2: 1, 5: 1}}")
assert dict(state["scheduler"]["milestones"]) == {2: 2, 5: 1, "2": 1, "5": 1}
PYTHON
