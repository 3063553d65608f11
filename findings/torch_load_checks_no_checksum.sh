#!/usr/bin/env bash
# torch 2.13.0: torch.save computes a checksum of every tensor, and torch.load never looks at it.
#
# Guess: a .pt file is a zip archive with a CRC-32 for each record, so that one flipped bit in a weight is an error at
# loading, as it is to `unzip -t`.
# Seen: it loads, with and without mmap and `weights_only`, and the weight is another number (100 became 50: one bit of
# its exponent). Python's own zipfile finds the record at once. So who wants to know has to ask zipfile, or keep a hash.
#
# Run: findings/torch_load_checks_no_checksum.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
FOLDER=$folder "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os
import zipfile

import torch

path = os.path.join(os.environ["FOLDER"], "weights.pt")
weights = torch.arange(1000.0)
torch.save({"weights": weights}, path)
with open(path, "rb") as file:
    content = bytearray(file.read())
place = content.find(weights.numpy().tobytes()) + 4 * 100 + 2
content[place] ^= 0x80
with open(path, "wb") as file:
    file.write(content)
for options in ({}, {"mmap": True}, {"weights_only": False}):
    loaded = torch.load(path, **options)["weights"]
    changed = (loaded != weights).nonzero().flatten().tolist()
    print(f"torch.load({options}): {len(changed)} other weight, {weights[100].item()} is {loaded[100].item()} now")
    assert changed == [100] and loaded[100] == 50
with zipfile.ZipFile(path) as archive:
    print(f"zipfile: {archive.testzip()} is damaged")
    assert archive.testzip() == "weights/data/0"
PYTHON
