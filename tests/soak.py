"""Kill random workers, spares and nodes every few seconds; each run must end as an undisturbed one does.

    python tests/soak.py --seconds 600 --every 15 [--nodes] [--strategy fsdp] [--snapshot-every 1] [--segments]

Exits with 1 if a run ended differently or not at all, if nothing was ever lost, or if something is left over: threads,
placement groups, processes, shared memory, half-written checkpoints.
"""

from __future__ import annotations

import argparse
import gc
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
from gpu.shared_memory import segment_names  # noqa: E402

import raytrainer  # noqa: E402
from raytrainer.callbacks import ModelCheckpoint  # noqa: E402
from raytrainer.errors import WorkerLostError  # noqa: E402


class Slow(Exact):
    """Long enough to be hit."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)


#: What Ray calls the processes of workers, of those that wait to become one, and of those that hold what these have.
TRAINING, STAGING, SPARE = b"ray::RemoteWorker", b"ray::StagingWorker", b"ray::Spare"
KILLED = (TRAINING, STAGING, SPARE)
ALL = (*KILLED, b"ray::Holder", b"ray::Keeper", b"ray::Claim")


def workers(kinds: tuple[bytes, ...] = (TRAINING,)) -> list[int]:
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


class Nodes(raytrainer.Callback):
    """Raylets that stand for nodes, each with room for one worker: two in use, and another one."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        soon = {"initial_delay_ms": 0, "period_ms": 300, "timeout_ms": 3000, "failure_threshold": 3}
        os.environ |= {f"RAY_health_check_{name}": str(value) for name, value in soon.items()}
        self.cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address: str = self.cluster.address
        self._nodes = [self.cluster.add_node(num_cpus=1) for _ in range(3)]

    def kill(self, rng: random.Random) -> bool:
        """One of them, unless one is lacking; whether it has."""
        if len(self._nodes) < 3:
            return False
        self.cluster.remove_node(self._nodes.pop(rng.randrange(3)), allow_graceful=False)
        return True

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        """Another one comes: here, since Ray starts some in a process's main thread alone."""
        if len(self._nodes) < 3:
            self._nodes.append(self.cluster.add_node(num_cpus=1))


class Killer(threading.Thread):
    """Sends SIGKILL to a random worker every few seconds, or to a node's raylet, while a run is on.

    Args:
        every: Seconds, on average.
        rng: Chooses.
        nodes: Of which to kill some, if given.
    """

    def __init__(self, every: float, rng: random.Random, nodes: Nodes | None) -> None:
        super().__init__(daemon=True)
        self.every, self.rng, self.nodes, self.kills = every, rng, nodes, dict[str, int]()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(self.rng.uniform(0.5, 1.5) * self.every):
            kind = self._kill()
            if kind:
                self.kills[kind] = self.kills.get(kind, 0) + 1

    def _kill(self) -> str | None:
        """What it was."""
        if self.nodes is not None and self.rng.random() < 0.25:
            return "node" if self.nodes.kill(self.rng) else None
        kinds = [kind for kind in KILLED if workers((kind,))]
        if not kinds:
            return None
        kind = self.rng.choice([*kinds, kinds[0]])  # first: however many there are, a spare is hit each third time
        try:
            os.kill(self.rng.choice(workers((kind,))), signal.SIGKILL)
        except (ProcessLookupError, IndexError):
            return None
        return kind.decode().removeprefix("ray::")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=float, default=4.0, help="mean seconds between kills")
    parser.add_argument("--spares", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", default="ddp", help='"ddp" or "fsdp"')
    parser.add_argument("--snapshot-every", type=int, default=3, help="1: each step is recorded")
    parser.add_argument("--save-every", type=int, default=7, help="steps between checkpoints")
    parser.add_argument("--nodes", action="store_true", help="raylets stand for nodes, and are killed too")
    parser.add_argument("--segments", action="store_true", help="shards are in memory that outlives workers")
    return parser.parse_args()


def main() -> int:
    args = arguments()

    import ray

    from raytrainer.driver.workers import idle_pool as pool
    from raytrainer.driver.workers.ray_group import RayGroup

    rng = random.Random(args.seed)
    if args.segments:
        RayGroup.stages = True  # type: ignore[misc, method-assign, assignment]
    nodes = None
    options: dict[str, Any] = {"strategy": args.strategy, "snapshot_every": args.snapshot_every}
    options |= {"max_failures": 1000, "spares": args.spares, "max_epochs": args.epochs}
    options |= {"accumulate_grad_batches": 1 if args.snapshot_every == 1 else 2}
    if args.nodes:
        nodes = Nodes()
        ray.init(address=nodes.address, log_to_driver=False)
        options |= {"num_nodes": args.workers, "num_processes": 1}
    else:
        ray.init("local", num_cpus=args.workers + 1, include_dashboard=False, log_to_driver=False)
        options |= {"num_processes": args.workers}

    def once(module: Slow) -> Any:
        saves = ModelCheckpoint(folder, save_top_k=0, save_last=True, every_n_train_steps=args.save_every)
        return run(module, folder, callbacks=[saves] if nodes is None else [saves, nodes], **options)

    bad = runs = recoveries = told = 0
    killer = Killer(args.every, rng, nodes)
    sources = dict[str, int]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            calm = Slow()
            rows = once(calm)[1]
            end = time.monotonic() + args.seconds
            killer.start()
            while time.monotonic() < end:
                module, began, before = Slow(), time.monotonic(), sum(killer.kills.values())
                verdict, met = "equal", 0
                try:
                    trainer, struck_rows = once(module)
                    met = len(trainer.recoveries)
                    for found in trainer.recoveries:
                        sources[found.source] = sources.get(found.source, 0) + 1
                    if not same(module, calm):
                        verdict = "DIFFERENT weights"
                    elif struck_rows != rows:
                        verdict = "DIFFERENT logged values"
                except WorkerLostError as error:  # with so many allowed: it was killed before there was a run to go on
                    verdict = f"told that it was lost while all started: {str(error)[:100]}"
                    told += 1
                except Exception as error:
                    verdict = f"FAILED {type(error).__name__}: {str(error)[:300]}"
                runs, recoveries = runs + 1, recoveries + met
                bad += verdict.startswith(("DIFFERENT", "FAILED"))
                seconds, kills = time.monotonic() - began, sum(killer.kills.values()) - before
                print(f"run {runs}: {kills} kills, {met} recoveries, {seconds:.1f} s: {verdict}", flush=True)
        finally:
            killer.over.set()
            if killer.ident is not None:
                killer.join()
            trainer = None  # which has its last state
            pool.close_idle()
            left = [*left_over(), *half_written(Path(folder))]
            ray.shutdown()
            if nodes is not None:
                nodes.cluster.shutdown()
    print(
        f"{runs} runs, kills {killer.kills}, {recoveries} recoveries from {sources}, {told} lost at their start",
        end="; ",
    )
    print(f"{bad} bad; left over: {left or 'nothing'}")
    return 1 if bad or left or not recoveries else 0  # a soak in which nothing was lost shows nothing


def half_written(folder: Path) -> list[str]:
    """What saves under way leave, and checkpoints that cannot be read."""
    from raytrainer.checkpointing.checkpoint_format import read_checkpoint

    found = [str(path) for name in ("meta-*.json", "new-*.json") for path in folder.rglob(name)]
    for path in folder.rglob("*.ckpt"):
        try:
            read_checkpoint(path)
        except Exception as error:
            found.append(f"{path}: {error}")
    return found


def left_over() -> list[str]:
    """What there is still after the last run, when what is killed has had ten seconds to go."""
    import ray

    def now() -> list[str]:
        groups = [table["state"] for table in ray.util.placement_group_table().values() if table["state"] != "REMOVED"]
        names = [thread.name for thread in threading.enumerate() if thread.name == "checkpoint-writer"]
        shared = [str(path) for path in Path("/dev/shm").glob("raytrainer-*")]
        return [*groups, *names, *shared, *sorted(segment_names()), *(f"process {pid}" for pid in workers(ALL))]

    end = time.monotonic() + 10
    while (found := now()) and time.monotonic() < end:
        gc.collect()  # memory of states goes with the last who knows them
        time.sleep(0.2)
    return found


if __name__ == "__main__":
    sys.exit(main())
