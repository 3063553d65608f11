"""What the checks on real GPUs share: a registry, a small module that notes what happens to it, and NVML."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raytrainer

__all__ = [
    "Net",
    "Rows",
    "Skipped",
    "another_process",
    "check",
    "checks",
    "data",
    "distance",
    "fit",
    "in_a_process",
    "is_mapped",
    "used_mib",
    "uuids",
]

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "seed": 7,
    "default_root_dir": tempfile.gettempdir(),
}

#: What workers a check wants, in the order in which checks share most: one, one and then all, all, or some of its own.
WORKERS = ("one", "both", "all", "own")

#: (name, GPUs needed, function that returns what it saw, and raises if that is wrong), by workers wanted.
_CHECKS: dict[str, list[tuple[str, int, Callable[[], str]]]] = {workers: [] for workers in WORKERS}


class Skipped(Exception):
    """What a check raises where something that it needs is not there; says what."""


def checks() -> list[tuple[str, int, Callable[[], str]]]:
    """All of them, in the order that starts the fewest workers."""
    return [item for workers in WORKERS for item in _CHECKS[workers]]


def check(gpus: int, workers: str = "own") -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a check that needs `gpus` GPUs, and wants one of `WORKERS`."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        _CHECKS[workers].append((function.__name__, gpus, function))
        return function

    return register


def _handles() -> list[Any]:
    pynvml.nvmlInit()
    return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]


def uuids() -> list[str]:
    """Of all GPUs, in NVML's order."""
    return [str(pynvml.nvmlDeviceGetUUID(handle)).removeprefix("GPU-") for handle in _handles()]


def used_mib() -> list[int]:
    return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) >> 20 for handle in _handles()]


def data(rows: int = 64, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.mean(1, keepdim=True)), batch_size=batch_size, **options)


class Net(raytrainer.Module):
    """A regression that notes losses, learning rates and where it ran.

    Args:
        dropout: Share of the hidden layer.
        fused: Use AdamW's fused kernel; None: use SGD.
        bursts: Batches whose loss, and so whose gradients, are infinite.
        schedule: Halve the learning rate with each step.
    """

    def __init__(
        self,
        dropout: float = 0.0,
        fused: bool | None = None,
        bursts: tuple[int, ...] = (),
        schedule: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 1))
        self.register_buffer("scale", torch.ones((), device=self.device))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.fused, self.bursts, self.schedule = fused, bursts, schedule
        self.losses: list[Tensor] = []
        self.rates: list[float] = []
        self.uuid = ""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        assert x.device == self.device
        self.calls += 1
        loss = F.mse_loss(self.layers(x) * self.scale, y)
        self.losses.append(loss.detach().clone())
        self.log("loss", loss)
        return loss * float("inf") if batch_idx in self.bursts else loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self) -> None:
        if self.device.type == "cuda":
            self.uuid = str(torch.cuda.get_device_properties(self.device).uuid).removeprefix("GPU-")

    def configure_optimizers(self) -> Any:
        if self.fused is None:
            optimizer: Any = torch.optim.SGD(self.parameters(), lr=2**-7, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=2**-8, fused=self.fused)
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Rows(raytrainer.Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    @property
    def names(self) -> set[str]:
        return {name for row in self.rows for name in row}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, params: Any) -> None:
        pass


def fit(
    module: raytrainer.Module, loader: Any = None, ckpt_path: str | None = None, **options: Any
) -> raytrainer.Trainer:
    """Two epochs on one GPU, unless told otherwise."""
    trainer = raytrainer.Trainer(**{**QUIET, "strategy": "ddp", "gpus": 1, "max_epochs": 2, **options})
    trainer.fit(module, data() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of weights and buffers."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


def is_mapped(address: int) -> bool:
    """Whether this process has memory there."""
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in spans)


# there Python and Ray's workers find these modules
_HERE = Path(__file__).parent


def in_a_process(code: str) -> str:
    """What Python prints; for what would start CUDA here."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=_HERE)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@contextmanager
def another_process(code: str) -> Iterator[str]:
    """A process beside this one, until the end; its first line."""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=_HERE)
    try:
        assert other.stdout is not None
        yield other.stdout.readline().strip()
    finally:
        other.kill()
        other.wait()
