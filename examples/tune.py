"""Hyperparameters of a digit classifier, searched by Ray Tune: ASHA ends the trials that fall behind.

    python examples/tune.py                         # a trial is one process
    python examples/tune.py --num-processes 2       # a trial is two workers

A trial is an ordinary `Trainer.fit` with a `TuneReportCallback`. `tune_resources` says what a trial reserves, so that
its workers come out of its own share of the cluster.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import raytrainer as rt


class Digits(rt.DataModule):
    """Scikit-learn's 1,797 digits, 360 of them held out."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        dataset = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
        self.train, self.val = random_split(dataset, [1437, 360], generator=torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=180)


class Classifier(rt.Module):
    """One hidden layer; its width and learning rate are searched."""

    def __init__(self, width: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def trial(config: dict[str, Any]) -> None:
    """One trial: train with the hyperparameters that Tune has picked, reporting after each epoch."""
    trainer = rt.Trainer(
        max_epochs=config["max_epochs"],
        num_processes=config["num_processes"],
        seed=7,
        callbacks=rt.TuneReportCallback(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(width=config["width"], lr=config["lr"])
    # a trial that is started again, say after its node was lost, goes on from what it reported last
    trainer.fit(module, datamodule=Digits(config["batch_size"]), ckpt_path=tune.get_checkpoint())


def main(arguments: Sequence[str] | None = None) -> float:
    """Search, validate the best trial's checkpoint here, and return its accuracy."""
    parser = argparse.ArgumentParser(description="Search hyperparameters with Ray Tune.")
    parser.add_argument("--num-samples", type=int, default=8, help="trials")
    parser.add_argument("--max-epochs", type=int, default=16, help="epochs of a trial that is not stopped")
    parser.add_argument("--num-processes", type=int, default=1, help="workers of each trial")
    parser.add_argument("--address", default=None, help="a Ray cluster; by default one is started here")
    parser.add_argument("--root", default="tune_results", help="where results go")
    args = parser.parse_args(arguments)
    if not ray.is_initialized():
        ray.init(args.address or os.environ.get("RAY_ADDRESS", "local"))

    tuner = tune.Tuner(
        tune.with_resources(trial, rt.tune_resources(num_processes=args.num_processes)),
        param_space={
            "width": tune.choice([16, 32, 64, 128]),
            "lr": tune.loguniform(1e-4, 3e-2),
            "batch_size": tune.choice([16, 32, 64]),
            "max_epochs": args.max_epochs,
            "num_processes": args.num_processes,
        },
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            num_samples=args.num_samples,
            scheduler=ASHAScheduler(max_t=args.max_epochs, grace_period=min(2, args.max_epochs)),
        ),
        run_config=tune.RunConfig(name="digits", storage_path=os.path.abspath(args.root), verbose=1),
    )
    results = tuner.fit()
    best = results.get_best_result()
    print(f"best of {len(results)}: {best.config}, {best.metrics['epoch'] + 1} epochs")

    module = Classifier.load_from_checkpoint(best.checkpoint)
    here = rt.Trainer(strategy="local", logger=False, enable_progress_bar=False)
    (metrics,) = here.validate(module, datamodule=Digits(32), verbose=False)
    print(f"validation accuracy: {metrics['val_acc']:.1%}")
    return metrics["val_acc"]


if __name__ == "__main__":
    main()
