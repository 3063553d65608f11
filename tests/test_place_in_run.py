"""Code that has no `self.trainer` can ask where it is."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from tiny import Tiny, data
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import raytrainer as rt
from raytrainer.place_in_run import take_place
from raytrainer.plan.ranks import Ranks


class Places(IterableDataset[Any]):
    """Where its iteration runs: rank, world size, part, parts."""

    def __iter__(self) -> Any:
        yield torch.tensor([rt.rank(), rt.world_size(), *rt.data_part()])


def test_outside_of_a_run() -> None:
    assert (rt.rank(), rt.world_size(), rt.data_part()) == (0, 1, (0, 1))


@pytest.mark.parametrize("start", [None, "fork", "spawn"])
def test_processes_of_loaders(start: str | None) -> None:
    processes = {None: 0, "fork": 2, "spawn": 1}[start]  # each that is spawned imports torch
    leave = take_place(Ranks(rank=3, world_size=4), part=1, parts=2)
    try:
        seen = [b.tolist() for b in DataLoader(Places(), None, num_workers=processes, multiprocessing_context=start)]
    finally:
        leave()
    assert seen == ([[3, 4, 2, 4], [3, 4, 3, 4]] if processes == 2 else [[3, 4, 1, 2]])
    assert (rt.rank(), rt.world_size(), rt.data_part()) == (0, 1, (0, 1))


def test_a_run_in_process_has_one_place(local_trainer: Any) -> None:
    seen = []

    class Asks(Tiny):
        def train_dataloader(self) -> Any:
            seen.append((rt.rank(), rt.world_size(), rt.data_part()))
            sampler: Any = DistributedSampler(data().dataset, rt.world_size(), rt.rank())
            return DataLoader(data().dataset, 2, sampler=sampler)

    trainer = local_trainer(max_epochs=1)
    trainer.fit(Asks())
    assert seen == [(0, 1, (0, 1))] and trainer.global_step == 10
    assert "RAYTRAINER_PLACE" not in os.environ


class Asking(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        torch.distributed.get_rank()


@pytest.mark.parametrize("where", ["hook", "dataset", "step"])
def test_who_asks_torch_is_told_whom_to_ask(where: str, local_trainer: Any) -> None:
    class Asks(Tiny):
        def train_dataloader(self) -> Any:
            if where == "hook":
                DistributedSampler(data().dataset)
            return DataLoader(Asking(torch.zeros(2)), 1) if where == "dataset" else data()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            torch.distributed.get_world_size()

    with pytest.raises((ValueError, RuntimeError), match=r"raytrainer\.rank\(\)"):
        local_trainer(max_epochs=1).fit(Asks())
