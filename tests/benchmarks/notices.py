"""A run whose nodes come and go: how soon a new one is used, and what notices of preemption at random moments cost.

    python tests/benchmarks/notices.py --notices 30 [--seconds 600] [--seed 1]

Raylets on this machine stand for nodes. First a run on one node finds a second; then random nodes are drained, as an
autoscaler does on a notice, and removed once they are left; each one prints a line. When time is up, no more are given,
and the verdict is on those that there were: another seed goes on. Exits with 1 where the end is not that of an
undisturbed run, a step was lost or trained twice, growth took more than ten seconds, or something is left over.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
for name, value in {"initial_delay_ms": 0, "period_ms": 300, "timeout_ms": 3000, "failure_threshold": 3}.items():
    os.environ[f"RAY_health_check_{name}"] = str(value)

from exact import Exact, run, same  # noqa: E402
from soak import left_over  # noqa: E402

import raytrainer  # noqa: E402

#: Seconds within which a new node is to be used.
SOON = 10.0


class Slow(Exact):
    """Long enough for nodes to come and go."""

    pause = 0.05

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.pause)
        return super().training_step(batch, batch_idx)


def drain(cluster: Any, node: Any) -> None:
    """Tell Ray that a node is wanted back in a minute."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(cluster.address).drain_node(
        node.node_id, reason, "wanted back", int(1000 * (time.time() + 60))
    )
    assert accepted, why


class Grows(raytrainer.Callback):
    """Adds a node after a moment; notes when the run uses it."""

    def __init__(self, cluster: Any) -> None:
        self.cluster, self.added, self.seconds = cluster, 0.0, 0.0

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        if not self.added and trainer.global_step >= 20:
            self.cluster.nodes.append(self.cluster.add_node(num_cpus=1))
            self.added = time.monotonic()
        if self.added and trainer.world_size == 2:
            self.seconds = time.monotonic() - self.added
            trainer.should_stop = True


class Notices(raytrainer.Callback):
    """Has nodes drained at random moments, one after the other; there is always one that nobody uses."""

    def __init__(self, cluster: Any, count: int, seconds: float, rng: random.Random) -> None:
        self.cluster, self.count, self.rng, self.given, self.noticed = cluster, count, rng, 0, 0.0
        self.drained: Any = None
        self.began = time.monotonic()
        self.next, self.end = self.began + 1.0, self.began + seconds

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        used = set(trainer._run.coordinator.group.by_node)
        if self.drained is not None:
            if self.drained.node_id in used:
                return
            left = f"left after {time.monotonic() - self.noticed:.1f} s, at step {trainer.global_step}"
            print(f"notice {self.given}, {self.noticed - self.began:.0f} s from the beginning: {left}", flush=True)
            self.cluster.nodes.remove(self.drained)
            self.cluster.remove_node(self.drained, allow_graceful=False)
            self.cluster.nodes.append(self.cluster.add_node(num_cpus=1))
            self.drained, self.next = None, time.monotonic() + self.rng.uniform(0.0, 2.0)
        elif self.given == self.count or time.monotonic() > self.end:
            trainer.should_stop = True
        elif time.monotonic() >= self.next:
            self.given, self.noticed = self.given + 1, time.monotonic()
            self.drained = self.rng.choice([node for node in self.cluster.nodes if node.node_id in used])
            drain(self.cluster, self.drained)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notices", type=int, default=30)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="for notices; the rest takes a minute or two"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    import ray
    from ray.cluster_utils import Cluster

    from raytrainer.driver.workers import idle_pool

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    bad = []
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.nodes = [cluster.add_node(num_cpus=1)]
        options: dict[str, Any] = {
            "strategy": "ddp", "num_processes": 1, "accumulate_grad_batches": 1, "max_epochs": 100_000,
            "placement_timeout": 5,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            grows = Grows(cluster)
            run(Slow(), folder, num_nodes=(1, 2), callbacks=[grows], max_time="00:00:02:00", **options)
            print(f"a new node is used after {grows.seconds:.1f} s", flush=True)
            if not 0 < grows.seconds <= SOON:
                bad.append("growth")
            cluster.nodes.append(cluster.add_node(num_cpus=1))
            notices = Notices(cluster, given.notices, given.seconds, random.Random(given.seed))
            moved, began = Slow(), time.monotonic()
            options |= {"num_nodes": 2, "snapshot_every": None}
            trainer, rows = run(moved, folder, callbacks=[notices], **options)
            seconds = [found.seconds for found in trainer.recoveries]
            lost = sum(found.replayed_batches for found in trainer.recoveries)
            print(
                f"{notices.given} notices, {len(seconds)} moves of {min(seconds):.1f} to {max(seconds):.1f} s, "
                f"{trainer.global_step} steps in {time.monotonic() - began:.0f} s, {lost} batches trained again",
                flush=True,
            )
            calm = Slow()
            calm.pause = 0.0
            _, calm_rows = run(calm, folder, **{**options, "max_steps": trainer.global_step})
            if not same(moved, calm):
                bad.append("other weights")
            if [row for row in rows if "loss_step" in row[1]] != [row for row in calm_rows if "loss_step" in row[1]]:
                bad.append("other rows")
            if lost or len(seconds) != notices.given:
                bad.append("lost steps, or moves that were none")
    finally:
        idle_pool.close_idle()
        bad += left_over()
        ray.shutdown()
        cluster.shutdown()
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    print(f"bad: {[*bad, *threads] or 'nothing'}")
    return 1 if bad or threads else 0


if __name__ == "__main__":
    sys.exit(main())
