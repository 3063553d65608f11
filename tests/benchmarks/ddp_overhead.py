"""What a DDP step costs over two Ray workers (gloo), beside torchrun's plain loop. Linear(32, 2), batch 8.

Run: python tests/benchmarks/ddp_overhead.py [--rounds 5] [--batches 1500]
Lightning is a column if it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step_overhead import loader, make
from timing import interleaved, table
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import raytrainer


def plain_loop(batches: int, out: str) -> None:
    """A rank of torchrun: the loop one would write by hand."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dataset = loader(batches * 2).dataset
    data = DataLoader(dataset, batch_size=8, sampler=DistributedSampler(dataset, shuffle=False))
    model = DistributedDataParallel(nn.Linear(32, 2), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    start = time.perf_counter()
    for x, y in data:
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    if dist.get_rank() == 0:
        Path(out).write_text(str(seconds / len(data)))
    dist.destroy_process_group()


def lightning_rank(batches: int, out: str) -> None:
    import lightning

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model = make(lightning.LightningModule, 0)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model(), loader(batches * 2))
    if trainer.is_global_zero:
        Path(out).write_text(str(model.seconds / batches))


def in_torchrun(role: str, batches: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/seconds"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        if role == "lightning":  # launches its second process itself
            command = [sys.executable]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        arguments = [__file__, "--role", role, "--batches", str(batches), "--out", out]
        subprocess.run([*command, *arguments], check=True, env=environment, capture_output=True)
        return float(Path(out).read_text())


class Timed(raytrainer.Module):
    """The benchmark's module; hands its time home as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(32, 2)
        self.seconds = 0.0

    def on_train_epoch_start(self) -> None:
        torch.set_num_threads(1)
        self.seconds = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        self.seconds = time.perf_counter() - self.seconds

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def over_ray(trainer: raytrainer.Trainer, batches: int) -> float:
    model = Timed()
    trainer.fit(model, loader(batches * 2))
    return model.seconds / batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=1500)
    parser.add_argument("--role", default="")
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    if arguments.role:
        {"plain": plain_loop, "lightning": lightning_rank}[arguments.role](arguments.batches, arguments.out)
        return
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    trainer = raytrainer.Trainer(
        strategy="ddp", num_processes=2, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with trainer:
        over_ray(trainer, 20)
        sides: dict[str, Callable[[], float]] = {
            "torchrun, by hand": lambda: in_torchrun("plain", arguments.batches),
            "raytrainer, 2 Ray workers": lambda: over_ray(trainer, arguments.batches),
        }
        if importlib.util.find_spec("lightning"):
            sides["Lightning ddp"] = lambda: in_torchrun("lightning", arguments.batches)
        figures = interleaved(sides, arguments.rounds)
    print(table(figures, "torchrun, by hand", "µs a step", 1e6))


if __name__ == "__main__":
    main()
