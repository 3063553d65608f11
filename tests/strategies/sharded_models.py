"""Modules and data for tests of sharded training, in double precision where they are compared."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import raytrainer as rt

WIDTH = 5  # uneven shards on two and on four workers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Net(rt.Module):
    """Three blocks between two layers that are in no block."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", self.loss(batch))
        self.log("rows", float(len(batch[0])), reduce_fx="sum")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Stateful(Net):
    """Dropout, and statistics that each worker has its own of."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.inp(x))
        for block in self.blocks:
            x = self.drop(block(x))
        return self.head(x)  # type: ignore[no-any-return]


def table(rows: int, dtype: torch.dtype = torch.float64) -> TensorDataset:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return TensorDataset(x, x.sin().sum(1, keepdim=True))


def loader(rows: int, batch_size: int, dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    return DataLoader(table(rows, dtype), batch_size=batch_size)


def joined(rows: int, batch_size: int, workers: int) -> DataLoader[Any]:
    """Batches of one process that are those of several workers, one after the other."""
    order = [
        worker + workers * (batch * batch_size + row)
        for batch in range(rows // (workers * batch_size))
        for worker in range(workers)
        for row in range(batch_size)
    ]
    return DataLoader(Subset(table(rows), order), batch_size=workers * batch_size)


class Counted(IterableDataset[Any]):
    """Rows whose number is not known before; each worker has every so many of them."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        group = torch.distributed.is_initialized()
        rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if group else (0, 1)
        yield from (row for index, row in enumerate(table(self.rows)) if index % size == rank)


def compare(
    forked: Any,
    make: Any,
    strategy: Any = "fsdp",
    workers: int = 2,
    val: Any = None,
    callbacks: Any = list,
    **options: Any,
) -> tuple[Any, Any]:
    """Train one and the same module in one process, and in shards with as many rows a step; the two trainers.

    All weights must be equal, and must have moved.
    """
    torch.manual_seed(0)
    start = make()
    alone, shared = copy.deepcopy(start), copy.deepcopy(start)
    common = {"precision": 64, "max_epochs": 2, **options}
    one = forked(strategy="local", callbacks=callbacks(), **common)
    one.fit(alone, loader(32, 4 * workers), val)
    two = forked(strategy=strategy, num_processes=workers, callbacks=callbacks(), **common)
    two.fit(shared, loader(32, 4), val)
    assert_equal(alone, shared)
    assert not all(
        torch.equal(value, start.state_dict()[name].to(value.dtype)) for name, value in weights(shared).items()
    )
    assert one.global_step == two.global_step > 0
    for name, value in one.callback_metrics.items():
        if name.startswith(("val", "rows")):
            torch.testing.assert_close(two.callback_metrics[name], value)
    return one, two


def weights(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


def assert_equal(one: nn.Module, other: nn.Module, atol: float = 1e-10) -> None:
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name].to(value.dtype), value, rtol=0.0, atol=atol, msg=name)


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(weights(other)[name], value) for name, value in weights(one).items())
