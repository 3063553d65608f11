"""Sources of data for two workers, of which one is killed; and a module that tells what it was given."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

import raytrainer as rt

SAMPLES = 32


class Shuffled(Sampler[list[int]]):
    """Batches by a generator of its own, of an order that it goes on from; fewer in even epochs."""

    def __init__(self) -> None:
        self.rng, self.epoch = numpy.random.default_rng(), 0  # another one in each worker
        self.order = list(range(SAMPLES))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 8 if self.epoch % 2 == 0 else 16

    def __iter__(self):
        size = SAMPLES // len(self)
        self.rng.shuffle(self.order)
        return iter([self.order[i : i + size] for i in range(0, SAMPLES, size)])


class Numbers(IterableDataset[Any]):
    """A stream with a state, dealt out to workers and their loaders' processes; noisy."""

    def __init__(self) -> None:
        self.start = self.at = 0

    def __iter__(self):
        part, parts = rt.data_part()  # in a loader's process, its own
        begin, self.start = self.start or part, 0
        for number in range(begin, SAMPLES, parts):
            self.at = number + parts
            yield torch.tensor([float(number), torch.rand(()).item()])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["at"]


TABLE = torch.stack([torch.arange(float(SAMPLES)), torch.zeros(SAMPLES)], 1)


def stateful(processes: int) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(TABLE, 4, shuffle=True, num_workers=processes)


def hugging_face() -> Any:
    import datasets
    from datasets.distributed import split_dataset_by_node

    rows: Any = datasets.Dataset.from_dict({"x": list(range(SAMPLES))}).to_iterable_dataset(num_shards=4)
    mine = split_dataset_by_node(rows.shuffle(seed=1, buffer_size=8), rank=rt.rank(), world_size=rt.world_size())
    return DataLoader(mine, 4, collate_fn=lambda rows: torch.tensor([[row["x"], 0.0] for row in rows]))


def ray_dataset(kept: bool) -> Any:
    import ray.data

    def rows(columns: Any) -> Any:
        return torch.stack([torch.as_tensor(columns["id"]).float(), torch.zeros(len(columns["id"]))], 1)

    dataset = ray.data.range(SAMPLES, override_num_blocks=4)
    return rt.RayDataset(dataset, batch_size=4, shuffle=True, keep_in_memory=kept, collate_fn=rows)


SOURCES = {
    "batch sampler": lambda: DataLoader(TABLE, batch_sampler=Shuffled()),  # type: ignore[arg-type]
    "stream": lambda: DataLoader(Numbers(), 2),
    "stream, 2 processes": lambda: DataLoader(Numbers(), 2, num_workers=2),
    "StatefulDataLoader": lambda: stateful(0),
    "StatefulDataLoader, 2 processes": lambda: stateful(2),
    "Hugging Face": hugging_face,
    "RayDataset, kept": lambda: ray_dataset(True),
    "RayDataset, streamed": lambda: ray_dataset(False),
}


class Data(rt.DataModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> Any:
        return SOURCES[self.kind]()


class Dataset(Data):
    """Where Ray deals it out."""

    train_dataset = Data.train_dataloader
    train_dataloader = rt.DataModule.train_dataloader


class Tells(rt.Module):
    """Weights tell the order and the noise of batches; a file tells each sample; rank 1 is killed, once."""

    def __init__(self, folder: Path, deadly: bool) -> None:
        super().__init__()
        self.folder, self.deadly = str(folder), deadly
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        flag = Path(self.folder, "killed")
        if self.deadly and self.global_rank == 1 and (self.current_epoch, batch_idx) == (1, 3) and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"{self.folder}/{self.global_rank}", "a") as file:
            file.writelines(f"{self.current_epoch} {batch_idx} {int(i)}\n" for i in batch[:, 0])
        return (self.weight - 0.01 * batch.mean() - torch.rand(1)).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def samples(folder: Path) -> dict[int, list[int]]:
    """By epoch; what was trained on again after a loss counts once."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for rank in range(2):
        for line in {**dict.fromkeys(Path(folder, str(rank)).read_text().splitlines())}:
            epoch, index, sample = map(int, line.split())
            found.setdefault((epoch, rank, index), []).append(sample)
    epochs: dict[int, list[int]] = {}
    for (epoch, _, _), items in sorted(found.items()):
        epochs.setdefault(epoch, []).extend(items)
    return {epoch: sorted(items) for epoch, items in epochs.items()}


def check(kind: str, make: Callable[..., rt.Trainer], folder: Path) -> None:
    """Each sample once an epoch, and a killed worker changes nothing."""
    if "StatefulDataLoader" in kind:
        pytest.importorskip("torchdata.stateful_dataloader")
    if kind == "Hugging Face":
        pytest.importorskip("datasets")
    modules = []
    for deadly in (False, True):
        own = folder / str(deadly)
        own.mkdir()
        module = Tells(own, deadly)
        trainer = make(max_epochs=3, seed=5, max_failures=1, snapshot_every=1)
        trainer.fit(module, datamodule=(Dataset if "RayDataset" in kind else Data)(kind))
        assert len(trainer.recoveries) == deadly
        assert samples(own) == {epoch: list(range(SAMPLES)) for epoch in range(3)}
        modules.append(module)
    assert torch.equal(modules[0].weight, modules[1].weight)
