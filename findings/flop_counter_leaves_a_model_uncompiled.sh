#!/usr/bin/env bash
# torch 2.13.0: a compiled model whose first step has its operations counted is never compiled.
#
# Guess: `FlopCounterMode` around the first step (how many operations it takes, for an MFU) either sees the operations of
# the compiled step, or has that one step run eagerly, and later steps are compiled as if it had not been there.
# Seen: later steps are not compiled either, and nothing says so: dynamo skips a function that it first meets while a
# `TorchDispatchMode` is on, and remembers that it is to be skipped. It is so with any such mode, with `torch.compile`
# and `module.compile()`. Counted after a first step, the model stays compiled. With `fullgraph=True` it is an error.
#
# Run: findings/flop_counter_leaves_a_model_uncompiled.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from contextlib import nullcontext

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class Passes(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).relu()


def compiled_frames(first, second, own, **options):
    torch._dynamo.reset()
    counter, model = CompileCounter(), Net()
    if own:
        model.compile(backend=counter, **options)
    else:
        model = torch.compile(model, backend=counter, **options)
    for around in (first, second, nullcontext(), nullcontext()):
        with around:
            model(torch.randn(2, 4)).sum().backward()
    return counter.frame_count


found = {}
for own, how in ((False, "torch.compile"), (True, "module.compile")):
    found[how] = [
        compiled_frames(nullcontext(), nullcontext(), own),
        compiled_frames(FlopCounterMode(display=False), nullcontext(), own),
        compiled_frames(Passes(), nullcontext(), own),
        compiled_frames(nullcontext(), FlopCounterMode(display=False), own),
    ]
    print(f"{how}: frames compiled in four steps: nothing counted, first step counted, in another mode, second counted")
    print("   ", found[how])
try:
    compiled_frames(FlopCounterMode(display=False), nullcontext(), False, fullgraph=True)
    error = None
except RuntimeError as raised:
    error = str(raised).splitlines()[0]
print("fullgraph=True, first step counted:", error)
assert all(frames == [1, 0, 0, 1] for frames in found.values()), found
assert error is not None and "no compiled frames" in error, error
PYTHON
