#!/usr/bin/env bash
# torchdata 0.11.0: a nodes.Loader that went on from an epoch's end gives the state of that end for ever.
#
# Guess: once it has been loaded, and the next epoch has begun, `state_dict()` says how far that is, as without a resume.
# Seen: until the epoch is over the state stays that of the end of the epoch before, whatever has been read; what is
# saved in it, and loaded, begins the epoch anew. A run that is interrupted twice, first between two epochs, trains on
# the first batches of an epoch twice. From a state within an epoch the rows are right (`num_yielded` counts one too many).
#
# Run: findings/torchdata_nodes_state_is_stuck.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 torchdata==0.11.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy

from torchdata.nodes import IterableWrapper, Loader


def read(loader, count):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def loaded(state):
    loader = Loader(IterableWrapper(range(6)))
    loader.load_state_dict(copy.deepcopy(state))
    return loader


for first in (6, 2):
    loader = Loader(IterableWrapper(range(6)))
    read(loader, first)
    again = loaded(loader.state_dict())
    rows = read(again, 3)
    state = again.state_dict()
    rest = list(loaded(state))
    print(f"interrupted after {first} of 6, and after {rows}: the state says {state['num_yielded']}, then come {rest}")
    assert rows == ([0, 1, 2] if first == 6 else [2, 3, 4])
    assert rest == ([0, 1, 2, 3, 4, 5] if first == 6 else [5])
PYTHON
