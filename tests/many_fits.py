"""Many fits in one process: what the driver and its workers hold after the last one, against after the hundredth.

    python tests/many_fits.py 1000 [--workers 2]

Each has a Trainer, a module and checkpoints of its own. Exits with 1 where threads, open files, files in the temporary
folder and /dev/shm, or (by more than 5 %) memory have grown.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from soak import workers as worker_processes
from tiny import Tiny, data

from raytrainer import ModelCheckpoint, Trainer

#: What may grow, in percent; everything else may not grow at all.
GROWTH = {"driver, MB": 5.0, "workers, MB": 5.0}


def megabytes(pid: int) -> float:
    """Memory that this process alone has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def held(folder: Path) -> dict[str, float]:
    """What there is now."""
    gc.collect()
    return {
        "threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
        "temporary files": sum(1 for path in folder.rglob("*") if "checkpoints" not in path.parts),
        "shared memory": len([name for name in os.listdir("/dev/shm") if name.startswith(("torch_", "sem."))]),
        "driver, MB": megabytes(os.getpid()),
        "workers, MB": sum(megabytes(pid) for pid in worker_processes()),
        "objects": float(len(gc.get_objects())),
    }


def fit(folder: Path, workers: int) -> None:
    options: dict[str, Any] = {"num_processes": workers, "snapshot_every": 3} if workers else {"strategy": "local"}
    checkpoints = ModelCheckpoint(folder / "checkpoints", save_top_k=1, every_n_train_steps=4)
    trainer = Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=checkpoints,
        default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(Tiny(), data(16, 2), data(4, 2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        tempfile.tempdir = place
        folder, began = Path(place), time.perf_counter()
        for number in range(1, given.count + 1):
            fit(folder, given.workers)
            if number == min(100, given.count // 2):
                first, began = held(folder), time.perf_counter()
            if number % 100 == 0:
                memory = ", ".join(f"{what} {value:.1f}" for what, value in held(folder).items() if "MB" in what)
                print(f"after {number}: {memory}", flush=True)
        seconds = (time.perf_counter() - began) / (given.count - min(100, given.count // 2))
        last = held(folder)
    print(f"{given.count} fits, {given.workers or 'no'} worker(s), {seconds:.3f} s each")
    grown = []
    for what, before in first.items():
        print(f"{what:>16}: {before:10.1f} -> {last[what]:10.1f}")
        if what != "objects" and last[what] > before * (1 + GROWTH.get(what, 0.0) / 100):
            grown.append(what)
    print(f"grown: {grown or 'nothing'}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
