"""A run whose losses depend on all that a module keeps beside its state dict."""

from __future__ import annotations

import dataclasses
import enum
import random
from collections import Counter, defaultdict, deque, namedtuple
from typing import Any

import numpy
import torch
from exact import Exact

Seen = namedtuple("Seen", "batch loss")


class Phase(enum.Enum):
    EARLY = 0
    LATE = 1


@dataclasses.dataclass
class Statistics:
    count: int = 0
    worst: float = 0.0


class Part(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = 1.0


class Drifting(Exact):
    """Each loss depends on everything that is no weight: it must be the same after a loss of workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("ema", torch.zeros(4), persistent=False)
        self.register_buffer("table", None, persistent=False)
        self.count, self.history, self.by_batch, self.latest = 0, [], defaultdict(list), deque(maxlen=3)
        self.often, self.met, self.phase, self.statistics = Counter(), set(), Phase.EARLY, Statistics()
        self.bank, self.array, self.row = torch.zeros(100, 100), numpy.zeros(3), Seen(0, 0.0)
        self.constant = torch.arange(10_000.0)
        self.draws, self.numbers, self.noise = random.Random(1), numpy.random.default_rng(1), torch.Generator()
        self.watched, self.gone = [self.net[0].weight], True
        self.part = Part()
        self.shared = self.history  # by another name
        self.net[0].weight.requires_grad_(False)

    def on_fit_start(self) -> None:
        self.begun, self.count = True, 0
        self.net[3].weight.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        """Is called anew where a run goes on after a loss, and must leave no trace then."""
        self.count, self.history[:], self.ema = 0, [], torch.zeros(4)
        if self.current_epoch == 1:
            self.net[3].weight.requires_grad_(True)
        with torch.no_grad():
            self.net[0].bias += 0.1
        for group in self.optimizers().param_groups:
            group["weight_decay"] += 0.01

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        value = float(loss.detach())
        self.count, self.ema = self.count + 1, 0.9 * self.ema + batch[0].mean(0)
        self.history.append(value)
        self.by_batch[batch_idx % 2].append(batch_idx)
        self.latest.append(value)
        self.often[batch_idx % 3] += 1
        self.met.add(batch_idx)
        self.phase = Phase.LATE if self.count % 2 else Phase.EARLY
        self.statistics.count, self.statistics.worst = self.statistics.count + 1, max(self.statistics.worst, value)
        self.bank[self.count % 100] += value
        self.array = self.array + value
        self.row = Seen(batch_idx, self.row.loss + value)
        self.part.inner *= 0.99
        self.table = torch.full((2,), value) if self.table is None else self.table + value
        if hasattr(self, "gone"):
            del self.gone
        assert self.watched[0] is self.net[0].weight and self.begun and self.shared is self.history
        drawn = self.draws.random() + self.numbers.random() + torch.rand((), generator=self.noise).item()
        numbers = (
            self.count, self.ema.sum().item(), sum(self.history), len(self.by_batch[1]), sum(self.latest),
            self.often[2], len(self.met), self.phase.value, self.statistics.worst, self.statistics.count,
            self.bank.sum().item(), self.array.sum(), self.row.loss, self.part.inner, self.table.sum().item(), drawn,
            self.constant[self.count].item(), hasattr(self, "gone"),
        )  # fmt: skip
        return loss * (1 + 0.01 * sum(float(number) for number in numbers))
