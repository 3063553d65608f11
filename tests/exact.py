"""A run in which everything random or stateful takes part, to be interrupted anywhere and compared bit for bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import raytrainer
from raytrainer.callbacks import ModelCheckpoint
from raytrainer.driver.workers.local_group import LocalGroup
from raytrainer.errors import WorkerLostError
from raytrainer.worker.actor.module_pickling import Pickled, dumps
from raytrainer.worker.worker import Worker


class Augmented(Dataset[Any]):
    """Samples with random noise: another one each time a sample is read."""

    def __init__(self, size: int = 53) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return x + 0.1 * torch.randn(4), x.sum(0, keepdim=True), index


class Died(BaseException):
    """The process that trains is gone; no handler of errors sees it coming."""


class Mortal(LocalGroup):
    """Workers as if of another process: they have copies, and die of `Died`."""

    in_process = False

    def setup(self, task):
        return super().setup(Pickled(dumps(task)).get())

    def __init__(self):
        super().__init__(Worker())

    def call(self, method, *args):
        try:
            return [method(self.worker, *args)]
        except Died:
            raise WorkerLostError(0, "is lost") from None


class Exact(raytrainer.Module):
    """Dropout, a schedule by steps and one by metric, metrics by step and by epoch.

    Args:
        die: (rank, batches done) at which to die; once, which the file `flag` remembers.
        how: "raise" `Died`, "kill" the process with SIGKILL, or "hang".
        flag: Path of that file.
        seen: Path of a file to which sample indices are appended, if given.
    """

    def __init__(
        self,
        die: tuple[int, int] | None = None,
        how: str = "raise",
        flag: str = "",
        seen: str = "",
        verb: str = "train",
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
        )
        self.die, self.how, self.flag, self.seen, self.verb = die, how, flag, seen, verb
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def perish_if_due(self, verb: str) -> None:
        if self.die is None or verb != self.verb or self.die != (self.global_rank, int(self.batches)):
            return
        if os.path.exists(self.flag):
            return
        Path(self.flag).touch()
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while self.how == "hang":
            time.sleep(0.05)  # what a hang is made of; the group's hang_timeout ends it
        raise Died

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.perish_if_due("train")
        self.batches += 1
        x, y, index = batch
        if self.seen:
            with open(f"{self.seen}-{self.global_rank}", "a") as file:
                file.write("".join(f"{self.current_epoch} {i}\n" for i in index.tolist()))
        loss = torch.nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.perish_if_due("validate")
        x, y, _ = batch
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        by_step = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 30)
        by_metric = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return [optimizer], [
            {"scheduler": by_step, "interval": "step"},
            {"scheduler": by_metric, "monitor": "val_loss"},
        ]


class Rows(raytrainer.Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any) -> None:
        pass


def loaders(batch_size: int = 4, num_workers: int = 0) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train = DataLoader(Augmented(), batch_size=batch_size, shuffle=True, num_workers=num_workers)
    return train, DataLoader(Augmented(22), batch_size=8)


def run(
    module: Exact, folder: Path | str, *, save_every: int = 0, ckpt_path: str | None = None, num_workers: int = 0,
    **options: Any,
) -> tuple[raytrainer.Trainer, list[tuple[int | None, dict[str, float]]]]:  # fmt: skip
    """Three epochs with accumulation and two validations an epoch; returns the trainer and what was logged."""
    logger = Rows()
    callbacks = []
    if save_every:
        callbacks.append(ModelCheckpoint(folder, save_top_k=0, save_last=True, every_n_train_steps=save_every))
    defaults: dict[str, Any] = {
        "strategy": "local", "max_epochs": 3, "seed": 5, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0,
        "val_check_interval": 0.5, "log_every_n_steps": 2, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "default_root_dir": folder,
    }  # fmt: skip
    trainer = raytrainer.Trainer(**{**defaults, "logger": logger, "callbacks": callbacks, **options})
    trainer.fit(module, *loaders(num_workers=num_workers), ckpt_path=ckpt_path)
    return trainer, logger.rows


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether weights and buffers are equal, bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
