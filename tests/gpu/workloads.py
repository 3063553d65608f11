"""The workloads that GPUs are measured with: a 124M-parameter GPT, and a layer so small that only overhead is left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["GPT", "WORKLOADS", "Workload"]

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 50304, 1024, 768, 12, 12


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """GPT-2 small, 124M parameters, tied embeddings; returns the loss of predicting each next token."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.apply(self._initialise)
        self.head.weight = self.token.weight

    @staticmethod
    def _initialise(layer: nn.Module) -> None:
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


class Small(nn.Module):
    """Linear(32, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean()


class Workload:
    """A model, its data, its optimizer and its precision."""

    def __init__(self, name: str, steps: int, warm: int) -> None:
        self.name, self.steps, self.warm = name, steps, warm

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return GPT() if self.name == "gpt" else Small()

    def loader(self, workers: int) -> DataLoader[Any]:
        """Data for `steps` batches on each worker."""
        generator = torch.Generator().manual_seed(0)
        if self.name == "gpt":
            rows = torch.randint(VOCABULARY, (16 * 8, CONTEXT), generator=generator)
            rows = rows.repeat(-(-self.steps * workers // 8), 1)[: 16 * self.steps * workers]
            return DataLoader(TensorDataset(rows), batch_size=16, pin_memory=True)
        rows = torch.randn(8 * self.steps * workers, 32, generator=generator)
        return DataLoader(TensorDataset(rows), batch_size=8, pin_memory=True)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        if self.name == "gpt":
            return torch.optim.AdamW(parameters, lr=3e-4, fused=True)
        return torch.optim.SGD(parameters, lr=1e-3)

    @property
    def precision(self) -> str:
        return "bf16-mixed" if self.name == "gpt" else "32-true"


WORKLOADS = {"gpt": Workload("gpt", 200, 10), "linear": Workload("linear", 2000, 200)}
