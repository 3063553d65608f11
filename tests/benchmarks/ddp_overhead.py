"""What a DDP step costs over two Ray workers (gloo), beside the plain loop in two processes. Linear(32, 2), batch 8.

Processes of both sides stay, each computes in one thread, and they take turns: short ones, in an order that rotates, so
that what else the machine is at falls on both. CPU seconds are rank 0's, of all threads of its process.

Run: python tests/benchmarks/ddp_overhead.py [--rounds 12] [--batches 1500]
Lightning, which starts anew in each of its turns, is a row if it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
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

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def plain_loop() -> None:
    """A rank of torchrun: the loop one would write by hand. Runs so many batches as each line of its input says."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for line in sys.stdin:
        dataset = loader(int(line) * 2).dataset
        data = DataLoader(dataset, batch_size=8, sampler=DistributedSampler(dataset, shuffle=False))
        model = DistributedDataParallel(nn.Linear(32, 2), gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        for x, y in data:
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(seconds / len(data), cpu / len(data), flush=True)
    dist.destroy_process_group()


class PlainRanks:
    """Two processes with the plain loop, which wait for their turns; started with torchrun's variables."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        self.ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--role", "plain"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank},
            )
            for rank in "01"
        ]  # fmt: skip

    def turn(self, batches: int) -> tuple[float, float]:
        """Seconds a step, and CPU seconds."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"{batches}\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline().split() for rank in self.ranks if rank.stdout is not None]
        return float(answers[0][0]), float(answers[0][1])

    def close(self) -> None:
        for rank in self.ranks:
            rank.communicate()


def lightning_rank(batches: int) -> None:
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
        print("seconds", model.seconds / batches)


def lightnings(batches: int) -> float:
    command = [sys.executable, __file__, "--role", "lightning", "--batches", str(batches)]
    done = subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, text=True)
    (seconds,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("seconds")]
    return float(seconds)


class Timed(raytrainer.Module):
    """The benchmark's module; hands its time home as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(32, 2)
        self.seconds = self.cpu = 0.0

    def on_train_epoch_start(self) -> None:
        torch.set_num_threads(1)
        self.seconds, self.cpu = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self) -> None:
        self.seconds, self.cpu = time.perf_counter() - self.seconds, time.process_time() - self.cpu

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def over_ray(trainer: raytrainer.Trainer, batches: int) -> tuple[float, float]:
    model = Timed()
    trainer.fit(model, loader(batches * 2))
    return model.seconds / batches, model.cpu / batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batches", type=int, default=1500)
    parser.add_argument("--role", default="")
    arguments = parser.parse_args()
    if arguments.role == "plain":
        plain_loop()
        return
    if arguments.role == "lightning":
        lightning_rank(arguments.batches)
        return
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    trainer = raytrainer.Trainer(
        strategy="ddp", num_processes=2, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    cpu: dict[str, list[float]] = {"by hand": [], "raytrainer, 2 Ray workers": []}

    def noted(side: str, figures: tuple[float, float]) -> float:
        cpu[side].append(figures[1])
        return figures[0]

    plain = PlainRanks()
    with trainer:
        sides: dict[str, Callable[[], float]] = {
            "by hand": lambda: noted("by hand", plain.turn(arguments.batches)),
            "raytrainer, 2 Ray workers": lambda: noted(
                "raytrainer, 2 Ray workers", over_ray(trainer, arguments.batches)
            ),
        }
        if importlib.util.find_spec("lightning"):
            sides["Lightning ddp"] = lambda: lightnings(arguments.batches)
        plain.turn(20)
        over_ray(trainer, 20)
        figures = interleaved(sides, arguments.rounds)
    plain.close()
    print(table(figures, "by hand", "µs a step", 1e6))
    print()
    print(table(cpu, "by hand", "CPU µs a step", 1e6))


if __name__ == "__main__":
    main()
