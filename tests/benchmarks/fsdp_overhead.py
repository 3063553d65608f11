"""What a step in shards costs more than in a loop by hand with torch's `fully_shard`, over gloo.

    python tests/benchmarks/fsdp_overhead.py --workers 2 --rounds 6

Both sides run in turn in the same forked workers, on data of the same shape, so that a busy machine slows both. The
figure of a round is the median step of rank 0. With --cpu it is the time of the CPU that its process has had, in which
others on the machine take less part.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from forked_group import ForkedGroup  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import raytrainer as rt  # noqa: E402
from raytrainer.driver.workers.group_supply import GroupSupply  # noqa: E402


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Net(rt.Module):
    """Trains, and then trains once more by hand; keeps the medians of both."""

    def __init__(self, width: int, depth: int, batch: int, steps: int, cpu: bool) -> None:
        super().__init__()
        self.sizes = width, depth, batch, steps, cpu
        self.clock = time.process_time if cpu else time.perf_counter
        self.inp, self.head = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.moments: list[float] = []
        self.ours = self.hand = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.moments.append(self.clock())
        loss = F.mse_loss(self(batch[0]), batch[0])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-4)

    def on_train_end(self) -> None:
        self.ours, self.hand = _median(self.moments), self.by_hand()

    def by_hand(self) -> float:
        width, _, batch, steps, _ = self.sizes
        model, moments, losses = Net(*self.sizes), list[float](), list[Tensor]()
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        optimizer = model.configure_optimizers()
        for (x,) in loader(width, batch, steps):
            moments.append(self.clock())
            loss = F.mse_loss(model(x), x)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
        return _median(moments)


def _median(moments: list[float]) -> float:
    return statistics.median(later - earlier for earlier, later in pairwise(moments[5:]))


def loader(width: int, batch: int, steps: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(batch * steps, width)), batch_size=batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    group = ForkedGroup(args.workers)
    GroupSupply.take = lambda supply, settings: group  # type: ignore[assignment,method-assign,return-value]
    GroupSupply.give_back = lambda supply, given: given.release()  # type: ignore[method-assign]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            module = Net(args.width, args.depth, args.batch, args.steps, args.cpu)
            trainer = rt.Trainer(
                strategy="fsdp", num_processes=args.workers, max_epochs=1, gradient_clip_val=1.0, logger=False,
                enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                default_root_dir=folder,
            )  # fmt: skip
            trainer.fit(module, loader(args.width, args.batch, args.steps * args.workers))
            found.append((module.ours, module.hand))
            print(f"ours {1e3 * module.ours:.2f} ms, by hand {1e3 * module.hand:.2f} ms", flush=True)
    group.abort()
    ours, hand = (min(side) for side in zip(*found, strict=True))
    print(f"least: ours {1e3 * ours:.2f} ms, by hand {1e3 * hand:.2f} ms: {ours / hand:.3f}")
    print(f"least quotient of a round: {min(ours / hand for ours, hand in found):.3f}")
    print(f"median quotient of a round: {statistics.median(ours / hand for ours, hand in found):.3f}")


if __name__ == "__main__":
    main()
