#!/usr/bin/env bash
# torch 2.13.0: whoever makes a DDP module keeps the process group for good, though it is destroyed.
#
# Guess: after `destroy_process_group()`, and once the module is gone, the group is, with its threads and its sockets, so
# that ranks which wait for this one are told by a closed connection.
# Seen: DDP's constructor imports torch._dynamo, and that torch.distributed.nn.functional, whose functions are defined
# with `group=group.WORLD`: the group of the moment of the import, whichever that is. It lives as long as the process. A
# rank that has left it so keeps others waiting, until their timeout. Where the module is imported before there is a
# group, the default is None, and the group goes as it should.
#
# Run: findings/dynamo_keeps_a_destroyed_process_group.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/leave.py" <<'PYTHON'
import gc
import os
import sys
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def threads():
    return len(os.listdir("/proc/self/task"))


if sys.argv[1] == "early":
    import torch.distributed.nn.functional
torch.set_num_threads(1)
before = threads()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
module = DistributedDataParallel(nn.Linear(2, 2))
group = weakref.ref(dist.group.WORLD)
del module
gc.collect()
dist.destroy_process_group()
gc.collect()
lives = group() is not None
print(f"imported {sys.argv[1]}: the group lives: {lives}, its threads: {threads() - before}")
assert lives == (sys.argv[1] == "late"), "this has changed"
assert (threads() > before) == (sys.argv[1] == "late"), "this has changed"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/leave.py" late
"$folder/venv/bin/python" -W ignore "$folder/leave.py" early
