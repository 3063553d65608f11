"""Several workers beside one: ddp, ddp2, dp, their settings, and averages of weights."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import Net, check, data, distance, fit, uuids
from torch import Tensor, nn
from torch.nn import functional as F

import raytrainer

TESTS = Path(__file__).resolve().parent.parent


@check(2, workers="both")
def ddp_equals_one_process() -> str:
    k, ways = len(uuids()), ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5})
    ones, manys = [Net() for _ in ways], [Net() for _ in ways]
    for one, options in zip(ones, ways, strict=True):
        fit(one, data(64 * k, 8 * k), **options)
    for many, options in zip(manys, ways, strict=True):
        fit(many, data(64 * k, 8), gpus=k, **options)
    worst = max(map(distance, ones, manys))
    assert worst < 1e-5, worst
    return f"{k} GPUs against one, also accumulating and clipping: weights differ by {worst:.1e} at most"


class Contrastive(raytrainer.Module):
    """In-batch negatives: the loss of a sample depends on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, _ = batch
        return {"a": self.encoder(x), "b": self.encoder(x.roll(1, dims=1))}

    def training_step_end(self, outputs: dict[str, Tensor]) -> Tensor:
        a, b = F.normalize(outputs["a"]), F.normalize(outputs["b"])
        return F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a), device=a.device))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@check(2, workers="both")
def ddp2_and_dp_equal_one_process() -> str:
    k, worst = len(uuids()), 0.0
    sizes = ((64, 16), (66, 11))  # the second does not divide evenly
    ones = [Contrastive() for _ in sizes]
    for one, (rows, batch) in zip(ones, sizes, strict=True):
        fit(one, data(rows, batch))
    for strategy in ("ddp2", "dp"):
        for one, (rows, batch) in zip(ones, sizes, strict=True):
            many = Contrastive()
            fit(many, data(rows, batch), gpus=k, strategy=strategy)
            worst = max(worst, distance(one, many))
    assert worst < 1e-5, worst
    return f"contrastive loss, {k} GPUs against one, uneven slices too: weights differ by {worst:.1e} at most"


@check(2)
def cases_of_node_strategies() -> str:
    """The cases of tests/strategies, over NCCL in processes of their own, each against one process on the CPU."""
    sys.path[:0] = [str(TESTS / "strategies"), str(TESTS.parent)]
    from node_cases import CASES, Looks, play

    from raytrainer.plan.ranks import Ranks

    gpus = min(len(uuids()), 4)
    code = "import sys, pathlib, node_cases as n; n.main(int(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]))"
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code]
        workers = [subprocess.Popen([*command, str(r), folder, str(gpus)], env=environment) for r in range(gpus)]
        assert not any([worker.wait(timeout=300) for worker in workers]), "a worker failed"
        by_rank = [pickle.loads((Path(folder) / f"found{rank}").read_bytes()) for rank in range(gpus)]
    worst, played = 0.0, []
    for name, case in CASES.items():
        if name not in by_rank[0] or case.nodes > 1 or case.module is Looks:
            continue
        wanted = play(case, Ranks(), None).weights
        found = [own[name].weights for own in by_rank if name in own]
        off = max(float((own[key] - wanted[key]).abs().max()) for own in found for key in wanted)
        assert off < 1e-9, (name, off)
        worst = max(worst, off)
        played.append(name)
    return f"{', '.join(played)}: weights differ by {worst:.1e} at most"


class Normed(Net):
    """With a BatchNorm, to be synchronised."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
        torch.manual_seed(0)
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.1)


@check(2, workers="both")
def sync_batchnorm() -> str:
    k = len(uuids())
    one, many = Normed(), Normed()
    fit(one, data(64 * k, 8 * k))
    fit(many, data(64 * k, 8), gpus=k, sync_batchnorm=True)
    worst = distance(one, many)
    assert worst < 1e-4, worst
    return f"{k} GPUs against one: weights differ by {worst:.1e} at most"


@check(2, workers="all")
def ddp_settings() -> str:
    k = len(uuids())
    plain, static, compressed = Net(), Net(), Net()
    fit(plain, data(64 * k, 8), gpus=k)
    fit(static, data(64 * k, 8), gpus=k, strategy=raytrainer.DDP(static_graph=True, bucket_cap_mb=5))
    fit(compressed, data(64 * k, 8), gpus=k, strategy=raytrainer.DDP(gradient_compression="bf16"))
    assert distance(plain, static) < 1e-6
    worst = distance(plain, compressed)
    assert 0 < worst < 5e-2, worst
    return f"static_graph and bucket_cap_mb change nothing; bf16 gradients change weights by {worst:.1e}"


@check(1, workers="all")
def averages_of_weights() -> str:
    """EMA and SWA on the GPUs against the same on CPUs."""
    k, worst = len(uuids()), 0.0
    for make in (
        lambda: raytrainer.EMAWeightAveraging(decay=0.9),
        lambda: raytrainer.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    ):
        on_gpus, on_cpu = Normed(), Normed()
        fit(on_gpus, data(64 * k, 8), gpus=k, max_epochs=4, callbacks=make(), sync_batchnorm=True)
        fit(on_cpu, data(64 * k, 8 * k), gpus=0, strategy="local", max_epochs=4, callbacks=make())
        worst = max(worst, distance(on_gpus, on_cpu))
    assert worst < 1e-3, worst
    return f"EMA and SWA, {k} GPU(s) against one CPU process: weights differ by {worst:.1e} at most"
