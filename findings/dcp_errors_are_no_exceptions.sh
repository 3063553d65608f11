#!/usr/bin/env bash
# torch 2.13.0, ray 2.60.0: what torch.distributed.checkpoint raises passes by `except Exception`.
#
# Guess: an absent folder raises FileNotFoundError, a key or shape that does not fit ValueError or RuntimeError, so that
# "else take the checkpoint before" needs `except Exception` and no more.
# Seen: each of them is a CheckpointException, which derives from BaseException alone, as KeyboardInterrupt does; also
# in one process, without a process group. An `except Exception` around `dcp.load` lets it through, a logging wrapper
# sees nothing, a fallback is not tried. From a Ray task the same error arrives as an Exception (RayTaskError is one),
# so that code behaves differently in a driver and on workers. What went wrong is in `failures`, by rank; for an absent
# folder that is an AssertionError.
#
# Run: findings/dcp_errors_are_no_exceptions.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 ray==2.60.0
FOLDER=$folder "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import os

import ray
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

logging.disable(logging.CRITICAL)
path = os.path.join(os.environ["FOLDER"], "checkpoint")
dcp.save({"part": torch.zeros(3)}, checkpoint_id=path)
asked = {
    "another shape": ({"part": torch.zeros(2)}, path, ValueError),
    "another key": ({"other": torch.zeros(3)}, path, RuntimeError),
    "no such folder": ({"part": torch.zeros(3)}, path + "-absent", AssertionError),
}


def load(state, where):
    try:
        dcp.load(state, checkpoint_id=where)
    except Exception as error:
        return f"except Exception has {error!r}"
    return "no error"


for what, (state, where, inner) in asked.items():
    try:
        seen = load(state, where)
    except BaseException as error:
        assert type(error) is CheckpointException, type(error)
        assert not isinstance(error, Exception)
        cause = type(error.failures[0][0])
        print(f"{what}: CheckpointException of {cause.__name__}, past `except Exception`")
        assert issubclass(cause, inner), cause
    else:
        raise AssertionError(f"{what}: {seen}")

ray.init(num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
try:
    ray.get(ray.remote(max_retries=0)(load).remote({"part": torch.zeros(2)}, path))
except Exception as error:
    print(f"from a Ray task: {type(error).__name__}, an Exception")
    assert isinstance(error, CheckpointException)
else:
    raise AssertionError("no error came from the task")
finally:
    ray.shutdown()
PYTHON
