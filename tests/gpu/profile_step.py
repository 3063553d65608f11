"""Where a small step's time goes on one GPU: variants with one thing taken out at a time, and a profile.

Run: python tests/gpu/profile_step.py [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import pstats
import statistics
import time
from typing import Any

import torch
from workloads import WORKLOADS

import raytrainer

WORKLOAD = WORKLOADS["linear"]


def by_hand() -> float:
    device = torch.device("cuda", 0)
    model = WORKLOAD.model().to(device)
    optimizer = WORKLOAD.optimizer(model.parameters())
    for step, (batch,) in enumerate(WORKLOAD.loader(1)):
        if step == WORKLOAD.warm:
            torch.cuda.synchronize()
            begun = time.perf_counter()
        loss = model(batch.to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / (WORKLOAD.steps - WORKLOAD.warm)


class Model(raytrainer.Module):
    """The small workload, with or without a log call and a hook."""

    def __init__(self, logs: bool) -> None:
        super().__init__()
        self.model, self.logs, self.result = WORKLOAD.model(), logs, 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == WORKLOAD.warm:
            torch.cuda.synchronize()
            self.result = time.perf_counter()
        loss = self.model(batch[0])
        if self.logs:
            self.log("loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        torch.cuda.synchronize()
        self.result = (time.perf_counter() - self.result) / (WORKLOAD.steps - WORKLOAD.warm)

    def configure_optimizers(self) -> Any:
        return WORKLOAD.optimizer(self.model.parameters())


def ours(strategy: str, logs: bool) -> float:
    trainer = raytrainer.Trainer(
        gpus=1, strategy=strategy, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    model = Model(logs)
    trainer.fit(model, WORKLOAD.loader(1))
    return float(model.result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    sides = {
        "by hand": by_hand,
        "local": lambda: ours("local", False),
        "local, log": lambda: ours("local", True),
        "Ray": lambda: ours("ddp", False),
        "Ray, log": lambda: ours("ddp", True),
    }
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            figures[name].append(side() * 1e6)
    for name, values in figures.items():
        print(f"{name:12} {statistics.median(values):7.1f} us  {[round(v) for v in values]}")
    if arguments.profile:
        profile = cProfile.Profile()
        profile.runcall(ours, "local", True)
        pstats.Stats(profile).sort_stats("tottime").print_stats(28)


if __name__ == "__main__":
    main()
