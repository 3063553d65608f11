"""ddp2 and dp over NCCL: the cases of `tests/strategies`, each against one process on the CPU. Prints one table.

Run on a machine with two or more GPUs: python tests/gpu/node_strategies.py
Cases that need more GPUs than there are are left out. Exits non-zero if one fails.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "strategies"), str(HERE.parent.parent)]

from node_cases import CASES, Looks, play  # noqa: E402

from raytrainer.plan.ranks import Ranks  # noqa: E402

RUN = "import sys, pathlib, node_cases; node_cases.main(int(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]))"


def main() -> int:
    gpus = min(torch.cuda.device_count(), 4)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", RUN]
        workers = [subprocess.Popen([*command, str(r), folder, str(gpus)], env=environment) for r in range(gpus)]
        if any([worker.wait(timeout=500) for worker in workers]):
            return 1
        by_rank = [pickle.loads((Path(folder) / f"found{rank}").read_bytes()) for rank in range(gpus)]
    for name, case in CASES.items():
        if name not in by_rank[0] or case.nodes > 1 or case.module is Looks:
            continue
        wanted = play(case, Ranks(), None).weights
        found = [own[name].weights for own in by_rank if name in own]
        off = max(float((own[key] - wanted[key]).abs().max()) for own in found for key in wanted)
        failed += off > 1e-9
        print(f"{name:24} {len(found)} GPUs   largest difference {off:.1e}   {'FAILED' if off > 1e-9 else 'ok'}")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
