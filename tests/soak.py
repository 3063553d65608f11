"""Kill random workers and spares every few seconds, for as long as told; each run must end as an undisturbed one does.

    python tests/soak.py --seconds 120 --workers 2 --every 15 --spares 1 [--strategy fsdp]

Exits with 1 if a run ended differently or not at all, if nothing was ever lost, or if something is left over: threads,
placement groups, workers' processes.
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


#: What Ray calls the processes of workers, and of those that wait to become one.
TRAINING, ALL = (b"ray::RemoteWorker",), (b"ray::RemoteWorker", b"ray::Spare")


def workers(kinds: tuple[bytes, ...] = TRAINING) -> list[int]:
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

    return [pid for pid, name in names.items() if name.startswith(kinds) and ours(pid)]


class Killer(threading.Thread):
    """Sends SIGKILL to a random worker every few seconds, while a run is on."""

    def __init__(self, every: float, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.every, self.rng, self.kills = every, rng, 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(self.rng.uniform(0.5, 1.5) * self.every):
            found = workers(ALL)
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
    parser.add_argument("--spares", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", default="ddp", help='"ddp" or "fsdp"')
    args = parser.parse_args()

    import ray

    from raytrainer.driver.workers import idle_pool as pool

    rng = random.Random(args.seed)
    ray.init("local", num_cpus=args.workers + 1, include_dashboard=False, log_to_driver=False)
    options = {"strategy": args.strategy, "num_processes": args.workers, "snapshot_every": 3, "max_failures": 1000}
    options |= {"spares": args.spares, "max_epochs": args.epochs}
    bad = runs = recoveries = 0
    killer = Killer(args.every, rng)
    try:
        with tempfile.TemporaryDirectory() as folder:
            calm = Slow()
            _, rows = run(calm, folder, **options)
            end = time.monotonic() + args.seconds
            killer.start()
            while time.monotonic() < end:
                module, began, before = Slow(), time.monotonic(), killer.kills
                verdict, met = "equal", 0
                try:
                    trainer, struck_rows = run(module, folder, **options)
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
        left = left_over()
        ray.shutdown()
    print(f"{runs} runs, {killer.kills} kills, {recoveries} recoveries, {bad} bad; left over: {left or 'nothing'}")
    return 1 if bad or left or not recoveries else 0  # a soak in which nothing was lost shows nothing


def left_over() -> list[str]:
    """What there is still after the last run, when what is killed has had ten seconds to go."""
    import ray

    def now() -> list[str]:
        groups = [table["state"] for table in ray.util.placement_group_table().values() if table["state"] != "REMOVED"]
        names = [thread.name for thread in threading.enumerate() if thread.name == "checkpoint-writer"]
        return [*groups, *names, *(f"process {pid}" for pid in workers(ALL))]

    end = time.monotonic() + 10
    while (found := now()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


if __name__ == "__main__":
    sys.exit(main())
