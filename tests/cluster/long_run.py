"""A run of half a minute whose end can be compared bit for bit; the driver prints how far it is."""

from __future__ import annotations

import argparse
import ast
import hashlib
import time
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import raytrainer as rt


class Steps(rt.Callback):
    """Prints a line whenever the driver hears of the workers, and what they were."""

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        print(f"step {trainer.global_step} world {trainer.world_size} at {time.time():.2f}", flush=True)


class Net(rt.Module):
    def __init__(self, pause: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pause = pause
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.pause)  # what a larger model would take
        return torch.nn.functional.mse_loss(self.net(batch[0]).squeeze(), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", default=None)
    parser.add_argument("--num-nodes", default="2", help="a number, or a pair such as 2,3")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--pause", type=float, default=0.05)
    parser.add_argument("--root", default="/root/run")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--placement-timeout", type=float, default=90.0)
    args = parser.parse_args()
    x = torch.randn(960, 8, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(x, x.sum(1)), batch_size=8, shuffle=True)
    module = Net(args.pause)
    trainer = rt.Trainer(
        strategy="ddp",
        address=args.address,
        num_nodes=ast.literal_eval(args.num_nodes),
        max_epochs=args.epochs,
        seed=5,
        snapshot_every=20,
        placement_timeout=args.placement_timeout,
        callbacks=[Steps(), rt.ModelCheckpoint(args.root, save_top_k=0, save_last=True, every_n_train_steps=50)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path="last" if args.resume else None)
    for recovery in trainer.recoveries:
        print(f"recovery {recovery}", flush=True)
    weights = b"".join(value.numpy().tobytes() for value in module.state_dict().values())
    print(f"weights {hashlib.sha256(weights).hexdigest()} world {trainer.world_size}", flush=True)


if __name__ == "__main__":
    main()
