"""A small GPT that reads and writes Python, character by character, trained on Python's own standard library.

    python examples/charlm.py                       # in this process
    python examples/charlm.py --num-processes 2     # the same, over two Ray workers

Files of the library are split into training and held-out ones; the score is bits per character on the latter.
"""

from __future__ import annotations

import argparse
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import raytrainer as rt

# printable ASCII and the newline; everything else is one unknown character
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = len(ALPHABET)
VOCABULARY = UNKNOWN + 1
TABLE = torch.full((256,), UNKNOWN)
TABLE[torch.tensor([ord(c) for c in ALPHABET])] = torch.arange(UNKNOWN)


def encode(text: bytes) -> Tensor:
    """Characters as numbers below VOCABULARY."""
    return TABLE[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()]


def decode(tokens: Tensor) -> str:
    return "".join("?" if token == UNKNOWN else ALPHABET[token] for token in tokens.tolist())


class Windows(Dataset[Tensor]):
    """A text cut into windows of `length` characters, each with the character that follows it."""

    def __init__(self, text: bytes, length: int) -> None:
        self.tokens, self.length = encode(text), length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.length
        return self.tokens[start : start + self.length + 1]


class StandardLibrary(rt.DataModule):
    """The modules of Python's standard library, up to `megabytes` of text; every tenth or so is held out."""

    def __init__(self, megabytes: float = 4.0, length: int = 64, batch_size: int = 16) -> None:
        super().__init__()
        self.megabytes, self.length, self.batch_size = megabytes, length, batch_size

    def setup(self, stage: str) -> None:
        texts: dict[str, list[bytes]] = {"train": [], "held out": []}
        left = int(self.megabytes * 1e6)
        # in the order of a checksum of their names, so that it is the same mixture on every machine
        for path in sorted(Path(os.__file__).parent.glob("*.py"), key=lambda path: zlib.crc32(path.name.encode())):
            text = path.read_bytes()[:left]
            left -= len(text)
            part = "held out" if zlib.crc32(path.name.encode()) % 10 == 0 else "train"
            texts[part].append(text)
        self.train = Windows(b"\n".join(texts["train"]), self.length)
        self.held_out = Windows(b"\n".join(texts["held out"]), self.length)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, batch_size=64)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, batch_size=64)


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each added to what goes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.before_mlp(x))


class GPT(rt.Module):
    """Predicts the next character from those before it."""

    def __init__(
        self, length: int = 64, width: int = 96, layers: int = 3, heads: int = 4, lr: float = 3e-3, warmup: int = 100
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        # a new tensor is made on self.device, wherever that is
        positions = torch.arange(tokens.shape[1], device=self.device)
        return self.head(self.norm(self.blocks(self.characters(tokens) + self.positions(positions))))

    def loss(self, windows: Tensor) -> Tensor:
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_bits", loss.detach() / math.log(2), prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_bits", self.loss(batch) / math.log(2), prog_bar=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_bits", self.loss(batch) / math.log(2), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, betas=(0.9, 0.95))
        steps, warmup = self.trainer.estimated_stepping_batches, self.hparams.warmup

        def factor(step: int) -> float:
            """Rises for `warmup` steps, then falls along half a cosine to a tenth."""
            if step < warmup:
                return (step + 1) / warmup
            done = min(1.0, (step - warmup) / max(1, steps - warmup))
            return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.inference_mode()
    def generate(self, prompt: str, characters: int, temperature: float = 0.7) -> str:
        """Go on writing after `prompt`."""
        self.eval()
        tokens = encode(prompt.encode()).unsqueeze(0).to(self.device)
        for _ in range(characters):
            logits = self(tokens[:, -self.hparams.length :])[:, -1]
            chosen = torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1)
            tokens = torch.cat([tokens, chosen], dim=1)
        return decode(tokens[0])


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, print a sample, and return bits per character on held-out files."""
    parser = argparse.ArgumentParser(description="Train a small GPT on the text of Python's standard library.")
    parser.add_argument("--max-steps", type=int, default=1500)
    parser.add_argument("--max-epochs", type=int, default=None, help="instead of --max-steps")
    parser.add_argument("--num-processes", type=int, default=1, help="1: this process; more: Ray workers")
    parser.add_argument("--gpus", type=int, default=None, help="GPUs on each node")
    parser.add_argument("--address", default=None, help="a Ray cluster to attach to")
    parser.add_argument("--limit-train-batches", type=int, default=None, help="batches per epoch, to try things out")
    parser.add_argument("--megabytes", type=float, default=4.0, help="how much text to read")
    parser.add_argument("--width", type=int, default=96, help="of the network")
    parser.add_argument("--sample", type=int, default=400, help="characters to write at the end")
    parser.add_argument("--root", default=".", help="where logs and checkpoints go")
    args = parser.parse_args(arguments)

    rt.seed_everything(7)
    module = GPT(width=args.width)
    # 16 windows a step, however many workers share them
    data = StandardLibrary(args.megabytes, batch_size=max(1, 16 // (args.gpus or args.num_processes)))
    trainer = rt.Trainer(
        max_steps=None if args.max_epochs else args.max_steps,
        max_epochs=args.max_epochs,
        num_processes=None if args.gpus else args.num_processes,
        gpus=args.gpus,
        address=args.address,
        limit_train_batches=args.limit_train_batches,
        # validate every 250 batches, however long an epoch is, on a part of the held-out files
        check_val_every_n_epoch=None,
        val_check_interval=250,
        limit_val_batches=20,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        callbacks=[rt.LearningRateMonitor()],
        default_root_dir=args.root,
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    # the trained weights are in this process's own module
    print(f"\n{module.generate('def ', args.sample)}\n")
    print(f"bits per character on held-out files: {metrics['test_bits']:.2f}")
    return metrics["test_bits"]


if __name__ == "__main__":
    main()
