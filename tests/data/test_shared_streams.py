"""Streams whose place is one number for all workers, by a double of mosaicml-streaming's dataset.

With the library itself, where it is installed: `python tests/data/kinds_of_sources.py --only mosaic`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_group import ForkedGroups
from torch.utils.data import DataLoader, IterableDataset

import raytrainer as rt
from raytrainer.data.own_sharding import remedy
from raytrainer.data.shared_streams import is_shared

SAMPLES = 48


class StreamingDataset(IterableDataset[Any]):
    """Deals batches out to workers from where all of them were; counts epochs from 0 in each run."""

    replication = None

    def __init__(self, batch: int) -> None:
        self.batch, self.next_epoch, self.canonical = batch, 0, rt.world_size()
        self.told: dict[str, int] = {}

    def __len__(self) -> int:
        return SAMPLES // rt.world_size()

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, int]:
        assert from_beginning
        return {"epoch": self.next_epoch - 1, "sample_in_epoch": num_samples, "canonical": self.canonical}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.told = state

    def __iter__(self) -> Iterator[Any]:
        epoch, done = self.next_epoch, 0
        if self.told and self.told["epoch"] >= epoch:
            epoch, done, self.canonical = self.told["epoch"], self.told["sample_in_epoch"], self.told["canonical"]
        self.next_epoch = epoch + 1
        order = list(range(SAMPLES))
        random.Random(10 * epoch + self.canonical).shuffle(order)
        rank, size, batch = rt.rank(), rt.world_size(), self.batch
        for at in range(done, SAMPLES, size * batch):
            yield from (torch.tensor([number]) for number in order[at + rank * batch : at + rank * batch + batch])


StreamingDataset.__module__ = "streaming.base.dataset"


class Derived(StreamingDataset):
    """A user's."""


class Data(rt.DataModule):
    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> Any:
        return DataLoader(Derived(self.batch), self.batch)


class Tells(rt.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.weight = str(folder), torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with open(f"{self.folder}/{self.global_rank}", "a") as file:
            file.writelines(f"{self.current_epoch} {int(number)}\n" for number in batch)
        return self.weight.square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.fixture(scope="module")
def forked_groups() -> Iterator[ForkedGroups]:
    groups = ForkedGroups()
    yield groups
    groups.close()


Fit = Callable[..., list[list[tuple[int, int]]]]


@pytest.fixture
def fit(forked_groups: ForkedGroups, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fit:
    """Fits three epochs of six steps; returns what each worker read: (epoch, sample)."""
    forked_groups.take_the_place_of_rays(monkeypatch.setattr)
    runs = iter(range(9))

    def run(workers: int, resumed: Path | None = None, saved: Path | None = None) -> list[list[tuple[int, int]]]:
        folder = tmp_path / str(next(runs))
        folder.mkdir()
        callbacks = [rt.ModelCheckpoint(saved, every_n_train_steps=1, save_top_k=-1, filename="{step}")]
        where: dict[str, Any] = {"strategy": "ddp", "num_processes": 2} if workers == 2 else {"strategy": "local"}
        trainer = rt.Trainer(
            max_epochs=3,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=saved is not None,
            callbacks=callbacks if saved is not None else [],
            **where,
        )
        trainer.fit(Tells(folder), datamodule=Data(8 // workers), ckpt_path=resumed)
        found = [(folder / str(rank)).read_text().splitlines() for rank in range(workers)]
        return [[(int(line.split()[0]), int(line.split()[1])) for line in lines] for lines in found]

    return run


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_after_resuming(workers: int, fit: Fit, tmp_path: Path) -> None:
    """Within an epoch and at its end: the library alone would begin with the first epoch again."""
    whole = fit(workers, saved=tmp_path / "saved")
    for epoch in range(3):
        read = [number for part in whole for e, number in part if e == epoch]
        assert sorted(read) == list(range(SAMPLES))
    batch = 8 // workers
    for step in (2, 6, 9):
        assert fit(workers, tmp_path / "saved" / f"step={step}.ckpt") == [part[step * batch :] for part in whole], step


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_workers_goes_on(
    before: int, after: int, fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(before, saved=tmp_path / "saved")
    rest = fit(after, tmp_path / "saved" / "step=9.ckpt", tmp_path / "more")
    done = [number for part in whole for epoch, number in part[: 9 * 8 // before] if epoch == 1]
    assert sorted(done + [number for part in rest for epoch, number in part if epoch == 1]) == list(range(SAMPLES))
    last = [sorted(number for part in run for epoch, number in part if epoch == 2) for run in (whole, rest)]
    assert last == [list(range(SAMPLES))] * 2
    assert "begins anew" not in caplog.text
    again = fit(after, tmp_path / "more" / "step=11.ckpt")  # in the epoch that others began
    assert again == [part[2 * 8 // after :] for part in rest]


def test_which_datasets_these_are() -> None:
    assert is_shared(StreamingDataset(1)) and is_shared(Derived(1))
    assert not is_shared(range(3))
    assert "train_dataloader()" in remedy(DataLoader(Derived(1)))
