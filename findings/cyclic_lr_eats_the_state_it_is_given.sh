#!/usr/bin/env bash
# torch 2.13.0: CyclicLR.load_state_dict takes a key out of the dict that it is given, which then loads no more.
#
# Guess: `load_state_dict` reads, and the checkpoint in memory stays what it is, as with all other schedulers.
# Seen: '_scale_fn_custom' is popped from the caller's dict and not put back. A second load of the same checkpoint (a
# tuner that goes back to its start, a second recovery from one snapshot, several folds from one start) is a KeyError. A
# checkpoint that is loaded, changed in another place and saved again can never be loaded. LambdaLR and MultiplicativeLR,
# which pop too, put theirs back.
#
# Run: findings/cyclic_lr_eats_the_state_it_is_given.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys

import torch
from torch.optim import lr_scheduler as schedulers

MAKERS = {
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=4),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=20),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
}


def made(name):
    return MAKERS[name](torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9))


for name in MAKERS:
    state = made(name).state_dict()
    keys = set(state)
    made(name).load_state_dict(state)
    gone = keys - set(state)
    print(f"{name}: gone after a load: {gone or 'nothing'}")
    assert gone == ({"_scale_fn_custom"} if name == "CyclicLR" else set())

checkpoint = {"scheduler": made("CyclicLR").state_dict(), "note": ""}
made("CyclicLR").load_state_dict(checkpoint["scheduler"])
checkpoint["note"] = "the best of three"
file = f"{sys.argv[1]}/again.pt"
torch.save(checkpoint, file)
for what, state in (("in memory", checkpoint["scheduler"]), ("saved again", torch.load(file)["scheduler"])):
    try:
        made("CyclicLR").load_state_dict(state)
    except KeyError as error:
        print(f"{what}: KeyError {error}")
    else:
        raise SystemExit(f"{what}: it has been loaded")
PYTHON
