"""Modules and data that several tests use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from raytrainer import Module

PATIENCE = 240  # seconds for what a busy machine takes a while to do


def table(samples: int, features: int = 4, seed: int = 7) -> TensorDataset:
    """Samples (x, y) with y a smooth function of x."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator)
    return TensorDataset(x, x.sin().sum(1, keepdim=True))


def loader(samples: int, batch_size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(table(samples), batch_size=batch_size, **options)


def numbers(count: int, batch_size: int, **options: Any) -> DataLoader[Any]:
    """Batches of the numbers 0, 1, 2, ... in shape (batch_size, 1)."""
    return DataLoader(torch.arange(float(count)).unsqueeze(1), batch_size=batch_size, **options)  # type: ignore[arg-type]


class Net(Module):
    """Two layers, SGD with momentum; its initial weights depend on `seed` alone."""

    def __init__(self, lr: float = 0.05, dropout: float = 0.0, seed: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        error = self(x) - y
        self.log_dict({"mse": error.square().mean(), "mae": error.abs().mean()})
        self.log("samples", float(len(x)), reduce_fx="sum")
        self.log("worst", error.abs().max(), reduce_fx="max")
        self.log("best", error.abs().min(), reduce_fx=torch.min)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


class Where(Net):
    """Notes which processes it ran in, in files of the folder `notes`."""

    def __init__(self, notes: Path, **options: Any) -> None:
        super().__init__(**options)
        self.notes = str(notes)

    def setup(self, stage: str) -> None:
        path = Path(self.notes) / f"{self.global_rank}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(os.getpid()))

    def taken(self) -> list[int]:
        """The processes of the latest run, by rank; forgets them."""
        paths = sorted(Path(self.notes).iterdir())
        pids = [int(path.read_text()) for path in paths]
        for path in paths:
            path.unlink()
        return pids


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_close(one: nn.Module, other: nn.Module, atol: float = 1e-6) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(
            other.state_dict()[name], value, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Bit by bit."""
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def moved(one: nn.Module, other: nn.Module) -> bool:
    return any(not torch.equal(other.state_dict()[name], value) for name, value in one.state_dict().items())


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition: Callable[[], bool], what: str | Callable[[], str]) -> None:
    """Wait until `condition` holds; `what` says, if need be at the end, what was waited for."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what() if callable(what) else what}"
        time.sleep(0.02)


class FastForward:
    """The one by which the driver waits for its workers, which can be put on: they have then not answered for long."""

    def __init__(self) -> None:
        self.added = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.added


class Graded(Net):
    """Reports a score that is known beforehand, and notes its workers' processes, which need not import Tune."""

    def __init__(self, score: float, notes: str) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        Path(self.hparams.notes, f"{self.hparams.score}-{self.global_rank}-{os.getpid()}").touch()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", float(self.hparams.score))
        self.log("workers", float(self.trainer.world_size))
