"""A module whose worker is killed at a chosen moment of a batch, with everything that differs from rank to rank."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from exact import Augmented
from torch.utils.data import DataLoader

import raytrainer

#: Where in a batch (or after one) a worker is killed.
MOMENTS = ("batch start", "forward", "backward", "before step", "after step", "batch end", "validation", "epoch start")


class Struck(raytrainer.Module):
    """Dropout, BatchNorm, momentum, a schedule, attributes, own generators, logged values.

    Args:
        rank: Who is killed.
        batches: After so many batches of the run.
        moment: Where in the next one, or after the latest.
        flag: Path of a file that says that it has been.
        seen: Path to which each rank adds the rows it has seen, and what it had drawn.
    """

    def __init__(self, rank: int = -1, batches: int = 0, moment: str = "", flag: str = "", seen: str = "") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
        )
        self.rank, self.batches, self.moment, self.flag, self.seen = rank, batches, moment, flag, seen
        self.count = 0
        self.history: list[float] = []

    def strike(self, moment: str) -> None:
        here = moment == self.moment and self.rank == self.global_rank and self.count == self.batches
        if here and not os.path.exists(self.flag):
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_epoch_start(self) -> None:
        self.strike("epoch start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.strike("batch start")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, index = batch
        self.strike("forward")
        out = self.net(x + 0.01 * torch.randn_like(x))
        out.register_hook(lambda gradient: self.strike("backward"))
        loss = torch.nn.functional.mse_loss(out, y)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("own", float(index.sum()), on_step=False, on_epoch=True, reduce_fx="sum")
        with open(f"{self.seen}-{self.global_rank}", "a") as file:
            file.write(f"{self.current_epoch} {self.global_step} {index.tolist()} {loss.item()!r}\n")
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.strike("before step")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.strike("batch end")
        self.count += 1
        self.history.append(float(torch.rand(())))
        self.log("drawn", self.history[-1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.strike("validation")
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        optimizer.register_step_post_hook(lambda *args: self.strike("after step"))
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 30), "interval": "step"}
        ]


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(Augmented(53), batch_size=4, shuffle=True), DataLoader(Augmented(22), batch_size=8)


def rows(seen: str) -> list[dict[tuple[str, str], str]]:
    """By rank, what each step was done with: of a step that was done again, the last time."""
    found = []
    for rank in range(2):
        lines = [line.split(" ", 2) for line in Path(f"{seen}-{rank}").read_text().splitlines()]
        found.append({(epoch, step): rest for epoch, step, rest in lines})
    return found


def repeated(seen: str) -> list[int]:
    """By rank, how many steps were done again."""
    return [len(Path(f"{seen}-{r}").read_text().splitlines()) - len(of) for r, of in enumerate(rows(seen))]
