"""A run that gets a second worker within an epoch, and loses one before, meanwhile, or right afterwards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from exact import Augmented, Rows, same
from struck import Struck, rows
from torch.utils.data import DataLoader

import raytrainer
from raytrainer.driver.loop import resizing
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.errors import WorkerLostError

#: The first step from which on there is room for two.
FROM = 3

ROWS = 56


class Strikes(Struck):
    """Also while the larger group begins, and as the state for it is taken."""

    def setup(self, stage: str) -> None:
        if self.trainer.world_size == 2:
            self.strike("setup")

    def on_fit_start(self) -> None:
        if self.trainer.world_size == 2:
            self.strike("fit start")

    def on_train_start(self) -> None:
        if self.trainer.world_size == 2:
            self.strike("train start")

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        self.strike("capture")


class Room(raytrainer.Callback):
    """For one worker, and for two once training has come so far; the second one may die as it joins.

    Attributes:
        dies: Whether it will.
        size: How many workers there is room for.
    """

    every_n_train_steps = 1  # each chunk has one step, so that growth comes after the same one

    def __init__(self, groups: Any, monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
        self.groups, self.dies, self.size, self.step = groups, dies, 1, 0
        monkeypatch.setattr(resizing, "LOOK_EVERY", 0.0)
        monkeypatch.setattr(GroupSupply, "take", lambda supply, settings, sizes=(): groups.take(self.size))
        monkeypatch.setattr(GroupSupply, "can_grow", lambda supply, settings, group: group.size == 1)
        monkeypatch.setattr(GroupSupply, "more_places", lambda supply, settings, group: self)
        monkeypatch.setattr(GroupSupply, "grow", lambda supply, group, places: self.grow(group))
        monkeypatch.setattr(GroupSupply, "leaving", lambda supply, group: {})

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        self.step = trainer.global_step

    def sure(self) -> bool:
        return self.step >= FROM

    def give_back(self) -> None:
        pass

    def grow(self, group: Any) -> Any:
        self.size = 2
        group.abort()
        if self.dies:
            self.dies = False
            raise WorkerLostError(1, "its process has ended")
        return self.groups.take(2)


def trained(forked: Any, room: Room, folder: Path, *where: Any) -> tuple[Any, Strikes, Any, Any]:
    folder.mkdir()
    module, logger = Strikes(*where, flag=f"{folder}/flag", seen=f"{folder}/seen"), Rows()
    Path(f"{module.seen}-1").touch()
    trainer = forked(
        strategy="ddp", num_processes=(1, 2), max_epochs=2, seed=5, val_check_interval=0.5, snapshot_every=2,
        log_every_n_steps=1, logger=logger, callbacks=[room], max_failures=1,
    )  # fmt: skip
    trainer.fit(
        module, DataLoader(Augmented(ROWS), batch_size=4, shuffle=True), DataLoader(Augmented(22), batch_size=8)
    )
    return trainer, module, logger.rows, rows(module.seen)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("moment", "batches", "rank"),
    [
        ("joining", 0, 1),
        ("forward", 1, 0),  # before there is room
        ("batch end", 2, 0),
        ("capture", 3, 0),  # the old one, as its state is taken
        # attributes are given to whoever joins, the count among them, after these
        *((moment, 0, rank) for moment in ("setup", "fit start", "train start") for rank in (0, 1)),
        ("backward", 3, 0),
        ("backward", 3, 1),
        ("after step", 4, 0),
        ("after step", 4, 1),
        ("validation", 5, 1),
        ("validation", 8, 0),
        ("epoch start", 9, 0),
    ],
)
def test_nothing_is_lost(
    moment: str,
    batches: int,
    rank: int,
    forked: Any,
    forked_groups: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Weights, values and rows are those of a run that grows at the same step and loses nobody."""
    with monkeypatch.context() as patch:
        calm = trained(forked, Room(forked_groups, patch, False), tmp_path / "calm")
    with monkeypatch.context() as patch:
        struck = trained(forked, Room(forked_groups, patch, moment == "joining"), tmp_path / "s", rank, batches, moment)
    assert moment == "joining" or os.path.exists(struck[1].flag)
    assert len(struck[0].recoveries) == 1
    assert same(struck[1], calm[1])
    assert struck[2] == calm[2] and struck[3] == calm[3]
    read = [int(i) for of in calm[3] for (epoch, _), rest in of.items() if epoch == "0"
            for i in rest[1 : rest.index("]")].split(", ")]  # fmt: skip
    assert sorted(set(read)) == list(range(ROWS))
