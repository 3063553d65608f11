"""What a module has beside its state dict, over the loss of its workers."""

from __future__ import annotations

import dataclasses
import enum
import logging
import random
from collections import Counter, defaultdict, deque, namedtuple
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from exact import Exact, Mortal, run, same

from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.driver.workers.group_supply import GroupSupply

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
        with torch.no_grad():
            self.net[0].bias += 0.1
        for group in self.optimizers().param_groups:
            group["weight_decay"] += 0.01

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        value = float(loss.detach())
        if self.batches == 6:
            self.net[3].weight.requires_grad_(True)
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


@pytest.mark.parametrize(("batches", "verb"), [(3, "train"), (9, "train"), (18, "train"), (21, "validate")])
def test_a_loss_of_workers_leaves_no_trace(
    batches: int, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first snapshot, within an epoch, in a later one (of 14 batches), and in a validation."""
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Mortal())
    calm, module = Drifting(), Drifting((0, batches), flag=f"{tmp_path}/flag", verb=verb)
    _, rows = run(calm, tmp_path, snapshot_every=3)
    trainer, struck_rows = run(module, tmp_path, snapshot_every=3)
    assert len(trainer.recoveries) == 1
    assert struck_rows == rows and same(module, calm)
    assert "begins anew" not in caplog.text


class Counts:
    """No data."""

    def __init__(self) -> None:
        self.batches, self.lock = 0, object()


class Opaque(Exact):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts, self.constant, self.memory = Counts(), Counts(), []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.counts.batches += 1
        self.memory.append(Counts())
        return super().training_step(batch, batch_idx)


def test_what_cannot_be_put_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Mortal())
    with caplog.at_level(logging.WARNING, "raytrainer"):
        run(Opaque((0, 9), flag=f"{tmp_path}/flag"), tmp_path, snapshot_every=3)
    said = [record.getMessage() for record in caplog.records if "begins anew" in record.getMessage()]
    assert len(said) == 1
    assert "Opaque.counts, Opaque.memory." in said[0]


def test_no_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is resumed begins with the module as it is made."""
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Mortal())
    run(Drifting(), tmp_path, save_every=2, max_epochs=1)
    assert all(
        set(own) >= {"rng"} and "attributes" not in own for own in read_checkpoint(tmp_path / "last.ckpt")["own"]
    )
