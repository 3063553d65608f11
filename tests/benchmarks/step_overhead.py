"""What a step costs beside a hand-written loop: one process, Linear(32, 2), batch 8, over the same DataLoader.

Run: python tests/benchmarks/step_overhead.py [--rounds 7] [--batches 2000]
Lightning is a column if it is installed.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved, table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raytrainer


def loader(batches: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * 8, 32, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :2].clone()), batch_size=8)


def by_hand(data: DataLoader[Any]) -> float:
    model = nn.Linear(32, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    start = time.perf_counter()
    for x, y in data:
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / len(data)


def make(base: type[Any], logs: int) -> Any:
    """The same module on either base class; times its own loop between the first and the last batch."""

    class Model(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(32, 2)

        def on_train_epoch_start(self) -> None:
            Model.start = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            Model.seconds = time.perf_counter() - Model.start

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            loss = nn.functional.mse_loss(self.model(x), y)
            for i in range(logs):
                self.log(f"loss{i}", loss, prog_bar=i == 0)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Model


def ours(data: DataLoader[Any], logs: int, **options: Any) -> float:
    model = make(raytrainer.Module, logs)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    raytrainer.Trainer(max_epochs=1, strategy="local", **{**quiet, **options}).fit(model(), data)
    return float(model.seconds) / len(data)


def lightnings(data: DataLoader[Any], logs: int, **options: Any) -> float:
    import lightning

    model = make(lightning.LightningModule, logs)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    lightning.Trainer(max_epochs=1, accelerator="cpu", **{**quiet, **options}).fit(model(), data)
    return float(model.seconds) / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--no-lightning", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    data = loader(arguments.batches)
    folder = tempfile.mkdtemp()

    def watched() -> float:
        return ours(data, 1, enable_progress_bar=True, logger=raytrainer.CSVLogger(folder))

    sides: dict[str, Callable[[], float]] = {
        "by hand": lambda: by_hand(data),
        "raytrainer": lambda: ours(data, 0),
        "raytrainer, 5 logs a step": lambda: ours(data, 5),
        "raytrainer, bar + CSV + 1 log": watched,
    }
    if not arguments.no_lightning:
        try:
            import lightning
            from lightning.pytorch.loggers import CSVLogger
        except ImportError:
            pass
        else:
            logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
            sides[f"Lightning {lightning.__version__}"] = lambda: lightnings(data, 0)
            sides["Lightning, 5 logs a step"] = lambda: lightnings(data, 5)
            sides["Lightning, bar + CSV + 1 log"] = lambda: lightnings(
                data, 1, enable_progress_bar=True, logger=CSVLogger(folder)
            )
    figures = interleaved(sides, arguments.rounds)
    print(table(figures, "by hand", "µs a step", 1e6))


if __name__ == "__main__":
    main()
