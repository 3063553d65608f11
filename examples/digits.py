"""Handwritten digits: a small convolutional network on scikit-learn's 1,797 images of 8 x 8 pixels.

    python examples/digits.py                       # in this process
    python examples/digits.py --num-processes 2     # the same, over two Ray workers

Nothing in here says where it runs: there is no loop, no `.cuda()` and no `.to(device)`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import raytrainer as rt


class DigitsData(rt.DataModule):
    """The images in three fixed parts: 1,197 to train on, 300 to validate on, 300 to test on."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        # runs in every worker, so that the data need not travel
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        dataset = TensorDataset(images, torch.tensor(digits.target))
        fixed = torch.Generator().manual_seed(0)
        self.train, self.val, self.test = random_split(dataset, [1197, 300, 300], generator=fixed)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=100)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=100)


class DigitsModule(rt.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, channels: int = 32, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()  # self.hparams, also kept in checkpoints
        self.net = nn.Sequential(
            nn.Conv2d(1, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(2 * channels * 2 * 2, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits = self(images)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels))
        self.log(f"{stage}_acc", (logits.argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, test the best checkpoint, and return its test accuracy."""
    parser = argparse.ArgumentParser(description="Train a small CNN on scikit-learn's digits.")
    parser.add_argument("--max-epochs", type=int, default=20)
    parser.add_argument("--num-processes", type=int, default=1, help="1: this process; more: Ray workers")
    parser.add_argument("--gpus", type=int, default=None, help="GPUs on each node")
    parser.add_argument("--num-nodes", type=int, default=1, help="nodes of a cluster, each with that many workers")
    parser.add_argument("--address", default=None, help="a Ray cluster to attach to")
    parser.add_argument("--placement-timeout", type=float, default=60.0, help="seconds to wait for nodes to start")
    parser.add_argument("--limit-train-batches", type=int, default=None, help="batches per epoch, to try things out")
    parser.add_argument("--root", default=".", help="where logs and checkpoints go")
    args = parser.parse_args(arguments)

    rt.seed_everything(7)
    module = DigitsModule()
    # 32 images a step, however many workers share them
    data = DigitsData(batch_size=max(1, 32 // (args.num_nodes * (args.gpus or args.num_processes))))
    best = rt.ModelCheckpoint(monitor="val_loss", filename="{epoch}-{val_loss:.3f}")
    trainer = rt.Trainer(
        max_epochs=args.max_epochs,
        num_processes=None if args.gpus else args.num_processes,
        gpus=args.gpus,
        num_nodes=args.num_nodes,
        address=args.address,
        placement_timeout=args.placement_timeout,
        limit_train_batches=args.limit_train_batches,
        callbacks=[best, rt.EarlyStopping(monitor="val_loss", patience=5)],
        default_root_dir=args.root,
    )
    trainer.fit(module, datamodule=data)
    print(f"best checkpoint: {best.best_model_path}")
    (metrics,) = trainer.test(module, datamodule=data, ckpt_path="best", verbose=False)
    print(f"test accuracy: {metrics['test_acc']:.1%}")
    return metrics["test_acc"]


if __name__ == "__main__":
    main()
