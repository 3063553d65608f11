"""A run in shards that gets more workers within an epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from sharded_models import Net, same_bits
from torch.utils.data import DataLoader

import raytrainer as rt
from raytrainer.driver.loop import resizing
from raytrainer.driver.workers.group_supply import GroupSupply

ROWS = 40


class Reads(Net):
    """Notes which rows each worker reads."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with Path(self.folder, f"{self.trainer.world_size}-{self.global_rank}").open("a") as file:
            file.writelines(f"{int(row)}\n" for row in batch[0][:, 0])
        x, y = batch
        return self.loss((x / ROWS, y))


class Data(rt.DataModule):
    def train_dataloader(self) -> Any:
        rows = torch.arange(float(ROWS), dtype=torch.float64)[:, None]
        table = torch.utils.data.TensorDataset(rows.expand(-1, 4), rows / ROWS)
        return DataLoader(table, 8 // rt.world_size(), shuffle=True)


class Sure:
    """Places in which processes have started."""

    def sure(self) -> bool:
        return True

    def give_back(self) -> None:
        pass


class Sizes(rt.Callback):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        self.sizes.append(trainer.world_size)


def test_each_row_once_and_as_a_run_that_goes_on_with_so_many(forked, forked_groups, monkeypatch, tmp_path):
    """Each worker's batches are half as large from then on, so that a step has as many rows as before."""
    sizes, saver = Sizes(), rt.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")

    def grow(supply: Any, group: Any, places: Any) -> Any:
        group.abort()
        return forked_groups.take(4)

    with monkeypatch.context() as patch:
        patch.setattr(resizing, "LOOK_EVERY", 0.0)
        patch.setattr(GroupSupply, "take", lambda supply, settings: forked_groups.take(2))
        patch.setattr(GroupSupply, "can_grow", lambda supply, settings, group: len(sizes.sizes) == 2)
        patch.setattr(GroupSupply, "more_places", lambda supply, settings, group: Sure())
        patch.setattr(GroupSupply, "grow", grow)
        patch.setattr(GroupSupply, "leaving", lambda supply, group: {})
        module = Reads(str(tmp_path))
        options: dict[str, Any] = {"precision": 64, "seed": 3, "max_epochs": 1, "gradient_clip_val": 0.1}
        trainer = forked(num_processes=(2, 4), callbacks=[sizes, saver], enable_checkpointing=True, **options)
        trainer.fit(module, datamodule=Data())
    grown = sizes.sizes.index(4)
    assert grown > 1 and sizes.sizes == [2] * grown + [4] * (ROWS // 8 - grown)
    read = [row for size in (2, 4) for file in tmp_path.glob(f"{size}-*") for row in file.read_text().split()]
    assert Counter(map(int, read)) == Counter(range(ROWS))
    again = Reads(str(tmp_path))
    forked(num_processes=4, **options).fit(again, datamodule=Data(), ckpt_path=tmp_path / f"step={grown}.ckpt")
    assert same_bits(module, again)
