"""Kill random workers every few seconds, for as long as told, and compare the end of each run with an undisturbed one.

    python tests/soak.py --seconds 120 --workers 2

Exits with 1 if a run ended differently or not at all, or if nothing was ever lost.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])

from exact import Exact, run, same  # noqa: E402


class Slow(Exact):
    """Long enough to be hit."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)


def workers() -> list[int]:
    """The training actors among the descendants of this process: those of other people's Ray are none of ours."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[pid] = (folder / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue  # it has ended meanwhile

    def ours(pid: int) -> bool:
        while pid > 1:
            if pid == os.getpid():
                return True
            pid = parents.get(pid, 0)
        return False

    return [pid for pid, name in names.items() if name.startswith(b"ray::RemoteWorker") and ours(pid)]


class Killer(threading.Thread):
    """Sends SIGKILL to a random worker every few seconds, while a run is on."""

    def __init__(self, every: float, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.every, self.rng, self.kills = every, rng, 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(self.rng.uniform(0.5, 1.5) * self.every):
            found = workers()
            if found:
                try:
                    os.kill(self.rng.choice(found), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.kills += 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=float, default=4.0, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import ray

    from raytrainer.driver.workers import idle_pool as pool

    rng = random.Random(args.seed)
    ray.init("local", num_cpus=args.workers + 1, include_dashboard=False, log_to_driver=False)
    options = {"strategy": "ddp", "num_processes": args.workers, "snapshot_every": 3, "max_failures": 1000}
    bad = runs = recoveries = 0
    killer = Killer(args.every, rng)
    try:
        with tempfile.TemporaryDirectory() as folder:
            calm = Slow()
            _, rows = run(calm, folder, max_epochs=6, **options)
            end = time.monotonic() + args.seconds
            killer.start()
            while time.monotonic() < end:
                module, began, before = Slow(), time.monotonic(), killer.kills
                verdict, met = "equal", 0
                try:
                    trainer, struck_rows = run(module, folder, max_epochs=6, **options)
                    met = len(trainer.recoveries)
                    if not same(module, calm):
                        verdict = "DIFFERENT weights"
                    elif struck_rows != rows:
                        verdict = "DIFFERENT logged values"
                except Exception as error:
                    verdict = f"FAILED {type(error).__name__}: {str(error)[:300]}"
                runs, recoveries = runs + 1, recoveries + met
                bad += verdict != "equal"
                seconds = time.monotonic() - began
                print(
                    f"run {runs}: {killer.kills - before} kills, {met} recoveries, {seconds:.1f} s: {verdict}",
                    flush=True,
                )
    finally:
        killer.over.set()
        pool.close_idle()
        ray.shutdown()
    print(f"{runs} runs, {killer.kills} kills, {recoveries} recoveries, {bad} bad")
    return 1 if bad or not recoveries else 0  # a soak in which nothing was lost shows nothing


if __name__ == "__main__":
    sys.exit(main())
