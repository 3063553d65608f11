"""What it costs to be ready for lost workers, and to lose one. Two CPU workers.

Snapshots: the share of its time that a run with `--megabytes` of state spends on them, by its own report, and steps
beside those of a run without. Recovery: from SIGKILL in a worker until its group is replaced and trains, beside the
time from `fit` to the first step with new workers in a Ray that runs.

Run: python tests/benchmarks/recovery.py [--rounds 3] [--seconds 60] [--megabytes 100]
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import raytrainer


class Model(raytrainer.Module):
    """Steps of 10 to 20 ms, beside `megabytes` of weights that do not train."""

    def __init__(self, megabytes: int = 0, flag: str = "") -> None:
        super().__init__()
        self.ballast = nn.Parameter(torch.zeros(megabytes * 2**18), requires_grad=False)
        self.head = nn.Linear(512, 512)
        self.flag, self.first, self.moments = flag, 0.0, [0.0]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        now = time.perf_counter()
        self.first = self.first or time.time()
        self.moments.append(now)
        if self.flag and self.global_rank == 1 and self.global_step == 20 and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(10):
            batch = self.head(batch).tanh()
        return batch.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=1e-3)


def fit(model: Model, **options: Any) -> raytrainer.Trainer:
    trainer = raytrainer.Trainer(
        strategy="ddp", num_processes=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(model, [torch.randn(256, 512)] * 100)
    return trainer


def snapshots(seconds: float, megabytes: int) -> tuple[float, float]:
    """Share of the time that is spent on snapshots, and steps' times beside those without."""
    steps, share = [], 0.0
    for every in ("auto", None):
        model = Model(megabytes)
        trainer = fit(model, max_time={"seconds": seconds}, snapshot_every=every)
        steps.append((model.moments[-1] - model.moments[20]) / (len(model.moments) - 21))
        if every == "auto":
            share = trainer.time_report.saving / trainer.time_report.total
    return share, steps[0] / steps[1]


def cold_start() -> float:
    raytrainer.Trainer(strategy="ddp", num_processes=2, logger=False).close()
    model, begun = Model(), time.time()
    fit(model, max_steps=2).close()
    return model.first - begun


def recovery() -> float:
    with tempfile.TemporaryDirectory() as folder:
        trainer = fit(Model(flag=f"{folder}/flag"), max_steps=40, snapshot_every=5)
    trainer.close()
    (found,) = trainer.recoveries
    return found.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--megabytes", type=int, default=100)
    arguments = parser.parse_args()
    logging.getLogger("raytrainer").setLevel(logging.CRITICAL)
    fit(Model(), max_steps=2)  # Ray runs from here on
    times = [(cold_start(), recovery()) for _ in range(arguments.rounds)]
    cold, recovered = (statistics.median(values) for values in zip(*times, strict=True))
    ratio = statistics.median(r / c for c, r in times)
    print("| | s | ratio |\n|---|---|---|")
    print(f"| from fit to the first step, new workers | {cold:.2f} | 1.00 |")
    print(f"| from a killed worker to training again | {recovered:.2f} | {ratio:.2f} |")
    found = [snapshots(arguments.seconds, arguments.megabytes) for _ in range(arguments.rounds)]
    share, slower = (statistics.median(values) for values in zip(*found, strict=True))
    print(f"\nSnapshots of {arguments.megabytes} MB: {share:.2%} of the time; steps take {slower:.3f} of their time.")


if __name__ == "__main__":
    main()
