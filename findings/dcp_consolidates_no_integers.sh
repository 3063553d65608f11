#!/usr/bin/env bash
# torch 2.13.0: DCP cannot put a model with BatchNorm into Hugging Face files: one whole number among it ends the save.
#
# Guess: `HuggingFaceStorageWriter(..., enable_consolidation=True)` writes any state dict of tensors, as safetensors have
# integers and booleans too, and as it does without consolidation.
# Seen: shards are written, and then the files that are to be whole are laid out by `torch.finfo` of each type, which
# refuses integers and booleans: `num_batches_tracked` of each BatchNorm, position ids, masks. The save raises after all
# ranks have written; the shards are whole, and are read back right. Floats of every width go through.
#
# Run: findings/dcp_consolidates_no_integers.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 packaging==26.3 fsspec==2026.9.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter


def save(name, state, consolidates):
    writer = HuggingFaceStorageWriter(
        name, {key: 1 for key in state}, save_distributed=True, enable_consolidation=consolidates
    )
    try:
        dcp.save(state, storage_writer=writer, no_dist=True)
    except BaseException as error:  # DCP's own is no Exception
        return type(next(iter(error.failures.values()))[0]).__name__
    return "saved"


floats = {str(kind): torch.ones(2, 3, dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.float64)}
norm = dict(torch.nn.BatchNorm1d(3).state_dict())
for name, state in {"floats": floats, "BatchNorm": norm, "mask": {"mask": torch.ones(2, dtype=torch.bool)}}.items():
    whole, shards = save(f"{name}/whole", state, True), save(f"{name}/shards", state, False)
    print(f"{name:10} consolidated: {whole:10} shards alone: {shards}")
    assert (whole, shards) == ("saved" if name == "floats" else "TypeError", "saved")

kept = Path("BatchNorm/whole/sharded")
read = {key: torch.zeros_like(value) for key, value in norm.items()}
dcp.load(read, storage_reader=HuggingFaceStorageReader(str(kept)), no_dist=True)
assert all(torch.equal(read[key], value) for key, value in norm.items())
assert not list(Path("BatchNorm/whole").glob("*.index.json"))
PYTHON
