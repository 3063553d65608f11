#!/usr/bin/env bash
# webdataset 1.0.2: `shardshuffle` gives the same order of shards in every epoch, unless it is to be deterministic.
#
# Guess: each pass over the dataset shuffles the shards anew, as each pass shuffles samples anew with `.shuffle(n)`;
# `detshuffle=True`, "deterministic", is the one that repeats itself.
# Seen: the other way round. The order is that of the first pass for ever, with and without a seed, so that in each
# epoch the same samples come early. With `detshuffle=True` passes differ, in one process. With loader processes, which
# begin anew in each epoch, its count of passes does as well, so that there too every epoch has the order of the first.
#
# Run: findings/webdataset_shuffles_shards_once.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 webdataset==1.0.2
FOLDER=$folder "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os

import webdataset

folder = os.environ["FOLDER"]


def passes(workers=0, **options):
    dataset = webdataset.WebDataset(f"{folder}/shard-{{0..7}}.tar", shardshuffle=100, **options).decode()
    if workers:
        dataset = webdataset.WebLoader(dataset, num_workers=workers, batch_size=None)
    return [[sample["cls"] for sample in dataset][::2] for _ in range(3)]


if __name__ == "__main__":
    for shard in range(8):
        with webdataset.TarWriter(f"{folder}/shard-{shard}.tar") as writer:
            for index in range(2):
                writer.write({"__key__": f"{shard}-{index}", "cls": shard})
    for options, same in (
        ({}, True),
        ({"seed": 1}, True),
        ({"detshuffle": True, "seed": 1}, False),
        ({"detshuffle": True, "seed": 1, "workers": 1}, True),
    ):
        seen = passes(**options)
        print(f"{options or 'default'}: shards in three passes {seen}")
        assert sorted(seen[0]) == [*range(8)]
        assert (seen[0] == seen[1] == seen[2]) == same
PYTHON
