#!/usr/bin/env bash
# torchdata 0.11.0: a StatefulDataLoader with a generator, resumed in process, shuffles later epochs otherwise.
#
# Guess: the state has what the rest of the epoch and the epochs after it need, whoever made the generator and with any
# number of workers.
# Seen: the rest of the epoch is right in all cases. With `num_workers=0` and `shuffle=True, generator=...` all later
# epochs are in another order than without the interruption. With two workers, without a generator, or with the same
# generator given to a RandomSampler they are the same. So a test with workers passes, and a run in process is another
# one from the next epoch on.
#
# Run: findings/stateful_dataloader_other_next_epoch.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 torchdata==0.11.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy

import torch
from torch.utils.data import RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

rows = list(range(12))


def make(how, workers):
    generator = torch.Generator().manual_seed(5)
    options = {
        "generator": {"shuffle": True, "generator": generator},
        "no generator": {"shuffle": True},
        "generator of the sampler": {"sampler": RandomSampler(rows, generator=generator)},
    }[how]
    torch.manual_seed(0)
    return StatefulDataLoader(rows, batch_size=4, num_workers=workers, **options)


def epochs(loader, count):
    return [[batch.tolist() for batch in loader] for _ in range(count)]


if __name__ == "__main__":
    for how in ("generator", "no generator", "generator of the sampler"):
        for workers in (0, 2):
            whole = epochs(make(how, workers), 3)
            loader = make(how, workers)
            next(iter(loader))
            state = copy.deepcopy(loader.state_dict())
            loader = make(how, workers)
            loader.load_state_dict(state)
            rest, *later = epochs(loader, 3)
            right = rest == whole[0][1:], later == whole[1:]
            print(f"{how}, {workers} workers: rest of the epoch is right: {right[0]}, later ones: {right[1]}")
            assert rest == whole[0][1:]
            assert (later == whole[1:]) == ((how, workers) != ("generator", 0))
PYTHON
