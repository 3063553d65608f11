"""Several raylets on one machine: nodes that go and come while a run is on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from exact import Exact, run, same
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray_models import eventually

import raytrainer
from raytrainer.driver.workers.ray_copies import SecondCopies
from raytrainer.driver.workers.ray_parts import PiecesInRay

PREEMPTED = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
HERE = Path(__file__).parent
HEALTH = {"initial_delay_ms": 0, "period_ms": 300, "timeout_ms": 3000, "failure_threshold": 3}


@pytest.fixture(scope="module")
def cluster(ray_ended: Callable[[], None]) -> Iterator[Any]:
    """A head that is too small to train on, and two nodes with two CPUs each in `cluster.pair`."""
    import ray
    from ray.cluster_utils import Cluster

    ray_ended()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in HEALTH.items():
            patch.setenv(f"RAY_health_check_{name}", str(value))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            cluster.pair = [cluster.add_node(num_cpus=2) for _ in range(2)]
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray_ended()
            cluster.shutdown()


class Nodes(raytrainer.Callback):
    """Removes the second node after two steps; adds one: before that if `spare`, else when the run has shrunk.

    With a spare node the run goes on when Ray knows of the loss, as it might end before otherwise.
    """

    def __init__(self, cluster: Any, spare: bool) -> None:
        self.cluster, self.spare = cluster, spare
        self.removed = self.added = False
        self.sizes: list[int] = []

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        if self.sizes[-1:] != [trainer.world_size]:
            self.sizes.append(trainer.world_size)
        # Ray tells of free CPUs with some delay, in which many small epochs pass
        trainer.should_stop |= self.sizes == [4, 2, 4]
        remove = not self.removed and trainer.global_step >= 2
        if not self.added and (remove if self.spare else self.sizes == [4, 2]):
            self.added = True
            self.cluster.pair.append(self.cluster.add_node(num_cpus=2))
        if remove:
            self.removed = True
            lost = self.cluster.pair.pop(1)
            self.cluster.remove_node(lost, allow_graceful=False)
            if self.spare:
                eventually(lambda: lost.node_id not in living(), "Ray knows of the loss")


def living() -> set[str]:
    """Ids of the cluster's nodes."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@pytest.mark.sample(0)
def test_shrinks_and_grows(cluster, tmp_path):
    nodes = Nodes(cluster, spare=False)
    trainer, _ = run(
        Exact(), tmp_path, callbacks=[nodes], strategy="ddp", num_nodes=(1, 2), num_processes=2, snapshot_every=1,
        placement_timeout=4, max_epochs=100_000, max_time="00:00:10:00", accumulate_grad_batches=1,
    )  # fmt: skip
    assert nodes.sizes == [4, 2, 4]
    (recovery,) = trainer.recoveries
    assert recovery.workers == 2


class Slow(Exact):
    """Does not end before a node's loss is felt: its workers live on for a moment."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.1)
        return super().training_step(batch, batch_idx)


class Drains(raytrainer.Callback):
    """Has Ray drain a node, as an autoscaler does on a notice of preemption, after three steps; then adds one."""

    def __init__(self, cluster: Any) -> None:
        self.cluster, self.nodes = cluster, list[set[str]]()

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        self.nodes.append(set(trainer._run.coordinator.group.by_node))
        if len(self.nodes) == 3:
            deadline = int(1000 * (time.time() + 60))
            gcs = GcsClient(self.cluster.address)
            accepted, why = gcs.drain_node(self.cluster.pair[1].node_id, PREEMPTED, "wanted back", deadline)
            assert accepted, why
            self.cluster.pair.append(self.cluster.add_node(num_cpus=2))


@pytest.mark.sample(0)
def test_a_node_that_is_drained_is_left_before_it_goes(cluster, tmp_path):
    """And no step is lost, nor trained again, with shards on both."""
    options = {
        "strategy": "fsdp", "num_nodes": 2, "num_processes": 2, "snapshot_every": None, "accumulate_grad_batches": 1,
        "max_epochs": 4,
    }  # fmt: skip
    calm, moved = Slow(), Slow()
    _, rows = run(calm, tmp_path, **options)
    drains = Drains(cluster)
    trainer, moved_rows = run(moved, tmp_path, callbacks=[drains], **options)
    drained = cluster.pair.pop(1).node_id
    assert drained in drains.nodes[0] and drained not in drains.nodes[-1]
    assert same(moved, calm) and moved_rows == rows
    (recovery,) = trainer.recoveries
    assert recovery.workers == 4 and recovery.replayed_batches == 0 and recovery.step == recovery.resumed_step


@pytest.mark.sample(0)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", raytrainer.FSDP(replicate="nodes")], ids=str)
def test_a_spare_node_takes_over(strategy, cluster, tmp_path):
    """Shards of the lost node come out of its neighbour's memory."""
    options = {
        "strategy": strategy, "num_nodes": 2, "num_processes": 2, "snapshot_every": 1, "accumulate_grad_batches": 1,
        "max_epochs": 4,
    }  # fmt: skip
    calm, struck = Slow(), Slow()
    _, rows = run(calm, tmp_path, **options)
    nodes = Nodes(cluster, spare=True)
    trainer, struck_rows = run(struck, tmp_path, callbacks=[nodes], **options)
    assert nodes.removed and nodes.sizes == [4]
    assert same(struck, calm)
    assert struck_rows == rows
    (recovery,) = trainer.recoveries
    assert recovery.workers == 4  # how many are new depends on how soon Ray moves the reservations


@pytest.mark.sample(0)
@pytest.mark.parametrize("held", [True, False])
def test_shards_of_a_lost_node(held, cluster):
    """Its neighbour has them, if it was asked to keep them."""
    import ray
    import torch

    node = cluster.add_node(num_cpus=1)
    pair = [node.node_id, cluster.pair[0].node_id]
    place = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    make = ray.remote(num_cpus=0)(_large).options(scheduling_strategy=place)
    refs = [make.remote(), ray.put(_large())]
    ray.wait(refs, num_returns=2, fetch_local=False)
    if held:
        copies = SecondCopies(pair)
        ray.get(copies.hold(refs))
    cluster.remove_node(node, allow_graceful=False)
    eventually(lambda: node.node_id not in living(), "Ray knows of the loss")
    layout = {"x": {"at": (0,), "shape": (200_000,), "dtype": torch.float32}}
    pieces = PiecesInRay([layout] * 2, refs, pair, raytrainer.CheckpointError)
    if held:
        pieces.look()
        assert torch.equal(pieces[0]["x"]["data"].read(), torch.ones(200_000))
    else:
        with pytest.raises(raytrainer.CheckpointError, match="the shards of rank 0 are gone"):
            pieces.look()


def _large() -> Any:
    import numpy

    return {"x": numpy.ones(200_000, numpy.float32).view(numpy.uint8)}
