"""What a validation of one batch after each step costs beyond that step: in process, and over two Ray workers (gloo).

Linear(32, 2), batch 8. An epoch in which each step is followed by a validation, less one of the same steps alone.

Run: python tests/benchmarks/validation.py [--rounds 5] [--batches 1000] [--beside CHECKOUT]
With another checkout of this repository (`git worktree add`), sides take turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raytrainer

HERE = Path(__file__).resolve().parents[2]


class Timed(raytrainer.Module):
    """Hands its time home as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(32, 2)
        self.seconds = 0.0

    def on_train_epoch_start(self) -> None:
        torch.set_num_threads(1)
        gc.collect()
        gc.freeze()  # a search through all that is imported takes as long as 200 validations
        self.seconds = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        self.seconds = time.perf_counter() - self.seconds

    def loss(self, batch: Any) -> Any:
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data(batches: int) -> DataLoader[Any]:
    x = torch.randn(batches * 8, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :2].clone()), batch_size=8)


def seconds(batches: int, workers: int, validates: bool) -> float:
    where: dict[str, Any] = {"strategy": "ddp", "num_processes": workers} if workers > 1 else {"strategy": "local"}
    trainer = raytrainer.Trainer(
        max_epochs=1, val_check_interval=1 if validates else batches, limit_val_batches=1 if validates else 0,
        num_sanity_val_steps=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **where,
    )  # fmt: skip
    module = Timed()
    trainer.fit(module, data(batches * workers), data(workers))
    return module.seconds


def figures(batches: int) -> dict[str, float]:
    """Milliseconds a validation, in one process of its own."""
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = {}
    for name, workers in (("in process", 1), ("two workers", 2)):
        seconds(20, workers, True)
        found[name] = (seconds(batches, workers, True) - seconds(batches, workers, False)) / batches * 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--beside", default="")
    parser.add_argument("--role", action="store_true")
    arguments = parser.parse_args()
    if arguments.role:
        print(json.dumps(figures(arguments.batches)))
        return
    sides = {"this": str(HERE), **({"beside": arguments.beside} if arguments.beside else {})}
    found: dict[str, dict[str, list[float]]] = {"in process": {}, "two workers": {}}
    for turn in range(arguments.rounds):
        for side in list(sides) if turn % 2 == 0 else reversed(list(sides)):
            command = [sys.executable, __file__, "--role", "--batches", str(arguments.batches)]
            environment = {**os.environ, "PYTHONPATH": sides[side], "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=sides[side], check=True)
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                found[name].setdefault(side, []).append(value)
    print("| a validation of one batch | ms | beside it, ms | ratio |\n|---|---|---|---|")
    for name, by_side in found.items():
        this, other = by_side["this"], by_side.get("beside", by_side["this"])
        ratio = statistics.median(a / b for a, b in zip(this, other, strict=True))
        print(f"| {name} | {statistics.median(this):.2f} | {statistics.median(other):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
