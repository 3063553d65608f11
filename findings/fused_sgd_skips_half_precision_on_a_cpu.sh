#!/usr/bin/env bash
# torch 2.13.0: SGD(fused=True) on a CPU leaves bfloat16 and float16 weights as they are, but for a few at the end.
#
# Guess: `fused` is the same update, faster; where it has no kernel for a type it says so, as for others it does.
# Seen: of a tensor in half precision only what does not fill a vector register at its end is updated (none of 1024, at
# most 8 of 1032). Everything else keeps its value at any rate, with and without momentum. So a module whose layers have
# round sizes does not train at all, with no message. float32 and float64 are right, and so are Adam and AdamW, fused,
# in all four types.
#
# Run: findings/fused_sgd_skips_half_precision_on_a_cpu.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

for kind, options in (
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {}),
):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for length in (1024, 1032):
            moved = {}
            for fused in (False, True):
                weight = torch.nn.Parameter(torch.ones(length, dtype=dtype))
                optimizer = kind([weight], lr=0.25, fused=fused, **options)
                for _ in range(2):
                    weight.grad = torch.full((length,), 0.5, dtype=dtype)
                    optimizer.step()
                moved[fused] = int((weight != 1).sum())
            print(f"{kind.__name__} {options or ''} {dtype}: fused moves {moved[True]} of {length}")
            assert moved[False] == length
            skips = kind is torch.optim.SGD and dtype in (torch.bfloat16, torch.float16)
            assert moved[True] <= length - 1024 if skips else moved[True] == length
PYTHON
