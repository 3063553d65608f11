"""`snapshot_every=1` over workers that hold the same: none but the step in progress is done again, to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.data
from exact import Rows, same
from mending_group import MendingSupply
from struck import MOMENTS, Struck, loaders, repeated, rows

import raytrainer
from raytrainer.worker.record_memory import RecordMemory
from raytrainer.worker.worker_run import WorkerRun

FLAG, SEEN = "flag", "seen"


def fit(module: Struck, folder: Path, data: Any = None, **options: Any) -> tuple[raytrainer.Trainer, list[Any]]:
    defaults: dict[str, Any] = {
        "strategy": "ddp", "num_processes": 2, "snapshot_every": 1, "max_epochs": 3, "seed": 5,
        "val_check_interval": 0.5, "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "default_root_dir": folder,
    }  # fmt: skip
    logger = Rows()
    trainer = raytrainer.Trainer(**{**defaults, "logger": logger, **options})
    train, validation = loaders()
    trainer.fit(module, train if data is None else data, validation)
    return trainer, logger.rows


def made(folder: Path, *where: Any, kind: type[Struck] = Struck) -> Struck:
    folder.mkdir()
    return kind(*where, flag=f"{folder}/{FLAG}", seen=f"{folder}/{SEEN}")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The undisturbed run, without snapshots: module, what was logged, and what each rank saw."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        MendingSupply(patch)
        module = made(folder / "run")
        _, logged = fit(module, folder, snapshot_every=None)
    return module, logged, rows(module.seen)


def the_only_loss(trainer: raytrainer.Trainer, module: Struck, logged: list[Any], calm: Any) -> Any:
    """What the report says of it, once module, rows and logged values are as in the undisturbed run."""
    expected, rows_logged, seen = calm
    assert Path(module.flag).exists()
    assert same(module, expected)
    assert (module.count, module.history) == (expected.count, expected.history)
    assert logged == rows_logged
    assert rows(module.seen) == seen
    (found,) = trainer.recoveries
    return found


#: An epoch has 7 batches for each of two workers, and is validated after 3 and 6.
WHERE = {"validation": (3, 6, 10), "epoch start": (7, 14)}


@pytest.mark.sample(4)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("moment", "batches"), [(moment, at) for moment in MOMENTS for at in WHERE.get(moment, (1, 3, 8, 20))]
)
def test_a_killed_worker_costs_the_step_in_progress(moment, batches, rank, calm, monkeypatch, tmp_path):
    supply, module = MendingSupply(monkeypatch), made(tmp_path / "run", rank, batches, moment)
    trainer, logged = fit(module, tmp_path)
    found = the_only_loss(trainer, module, logged, calm)
    assert found.source == "what each worker had recorded" and found.replayed_batches == 0
    assert max(repeated(module.seen)) <= 1
    assert len(supply.chosen) == 1


@pytest.fixture(params=[1, 2, None], ids=lambda batches: f"chunks of {batches}")
def behind(request, monkeypatch):
    """As with GPUs, which come to a moment later than their workers, and have work while a chunk is reported."""
    if request.param is not None:
        monkeypatch.setattr("raytrainer.plan.steps_and_epochs.chunk_batches", lambda batches, _: request.param)
    monkeypatch.setattr("raytrainer.worker.step_records._lags", lambda device: True)
    monkeypatch.setattr(WorkerRun, "ahead", property(lambda self: True, lambda self, value: None), raising=False)


@pytest.mark.sample(4)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("moment", "batches"), [(moment, at) for moment in MOMENTS for at in WHERE.get(moment, (2, 3, 5, 8, 20))]
)
def test_a_device_that_is_behind_costs_what_was_queued_too(moment, batches, rank, calm, behind, monkeypatch, tmp_path):
    supply, module = MendingSupply(monkeypatch), made(tmp_path / "run", rank, batches, moment)
    trainer, logged = fit(module, tmp_path)
    found = the_only_loss(trainer, module, logged, calm)
    assert found.source == "what each worker had recorded" and found.replayed_batches <= 2
    assert max(repeated(module.seen)) <= 3
    assert len(supply.chosen) == 1


class ByHand(Struck):
    """Two optimizers, each stepped in each batch; the worker is killed between their steps, as "after step"."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.net[0].parameters(), lr=0.02, momentum=0.9)
        first.register_step_post_hook(lambda *args: self.strike("after step"))
        return [first, torch.optim.AdamW(self.net[3].parameters(), lr=0.01)]


class EditsWeights(Struck):
    """Changes weights beside the optimizer, by ways that leave no version."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[3].weight.data[0, 0] += 0.01
        super().on_train_batch_start(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.net[0].weight.data.clamp_(-0.3, 0.3)


class SkipsTheRest(Struck):
    """Of each epoch, from its sixth batch on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        super().on_train_batch_start(batch, batch_idx)
        return -1 if batch_idx == 5 else None


class StepsEachEpoch(Struck):
    """Its scheduler counts epochs, and is stepped with an epoch's last batch."""

    def configure_optimizers(self) -> Any:
        (optimizer,), _ = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class DiesInItsRecord(Struck):
    """When half of a record is written."""

    def on_train_start(self) -> None:
        write, module = RecordMemory.write, self

        def half(records: Any, rank: int, turn: int, moment: Any, record: bytes) -> bool:
            if module.moment == "record" and module.count == module.batches and rank == module.rank:
                write(records, rank, turn, moment, record[: len(record) // 2])
                at = records._place(rank, turn)
                records._memory[at : at + 8] = bytes(8)
                module.strike("record")
            return write(records, rank, turn, moment, record)

        RecordMemory.write = half  # type: ignore[method-assign]


class Endless(torch.utils.data.IterableDataset[Any]):
    """A stream whose length nobody knows, of which each worker has a part, with random noise."""

    def __iter__(self) -> Any:
        part, parts = raytrainer.data_part()
        for index in range(part, 53, parts):
            yield torch.randn(4), torch.randn(1), index


def stream() -> Any:
    return torch.utils.data.DataLoader(Endless(), batch_size=4)


@pytest.mark.sample(4)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("kind", "moment", "batches", "options"),
    [
        (ByHand, "after step", 8, {}),
        (EditsWeights, "backward", 8, {}),
        (EditsWeights, "after step", 9, {}),
        (SkipsTheRest, "batch start", 4, {}),
        (SkipsTheRest, "backward", 9, {}),
        (StepsEachEpoch, "epoch start", 7, {}),
        (StepsEachEpoch, "validation", 7, {"val_check_interval": 1.0}),
        (DiesInItsRecord, "record", 9, {}),
        (Struck, "batch end", 8, {"strategy": raytrainer.DDP(broadcast_buffers=False)}),
        (Struck, "forward", 9, {"data": stream, "val_check_interval": 1.0}),
        (Struck, "after step", 2, {"strategy": "ddp2", "limit_train_batches": 4}),
        (Struck, "batch end", 5, {"strategy": "dp", "limit_train_batches": 4}),
        (Struck, "after step", 9, {"limit_train_batches": 4, "check_val_every_n_epoch": 2, "precision": "bf16-mixed"}),
    ],
)
def test_all_kinds_of_runs(kind, moment, batches, options, rank, monkeypatch, tmp_path):
    def once(folder: Path, *where: Any) -> Any:
        given = {**options, "data": options["data"]()} if "data" in options else options
        module = made(folder, *where, kind=kind)
        return module, *fit(module, folder, **given)

    supply = MendingSupply(monkeypatch)
    expected, _, expected_rows = once(tmp_path / "calm")
    module, trainer, logged = once(tmp_path / "struck", rank, batches, moment)
    assert Path(module.flag).exists()
    assert same(module, expected) and (module.count, module.history) == (expected.count, expected.history)
    assert logged == expected_rows
    assert rows(module.seen) == rows(expected.seen)
    (found,) = trainer.recoveries
    assert found.source == "what each worker had recorded" and len(supply.chosen) == 1
    assert max(repeated(module.seen)) <= 2  # a step, and the beginning of the one in progress


class TooMuch(Struck):
    """An attribute that grows beyond what a record has room for."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.count == 6:
            self.__dict__["grown"] = list(range(400_000))


@pytest.mark.parametrize(
    ("kind", "batches", "options", "source"),
    [
        (Struck, 0, {}, "the run's beginning"),
        (Struck, 9, {"accumulate_grad_batches": 2}, "a snapshot"),
        (TooMuch, 9, {}, "a snapshot"),
        (Struck, 9, {"snapshot_every": 2}, "a snapshot"),
    ],
)
def test_where_steps_are_not_recorded_snapshots_serve(kind, batches, options, source, monkeypatch, tmp_path):
    MendingSupply(monkeypatch)
    expected = made(tmp_path / "calm", kind=kind)
    _, expected_rows = fit(expected, tmp_path, **options)
    module = made(tmp_path / "struck", 1, batches, "forward", kind=kind)
    trainer, logged = fit(module, tmp_path, **options)
    assert same(module, expected) and logged == expected_rows
    (found,) = trainer.recoveries
    assert found.source == source
    assert source in str(found)


class DiesAgain(Struck):
    """Is killed three times: in a step, before training has gone on, and in the very next step."""

    def strike(self, moment: str) -> None:
        for index, where in enumerate([("forward", 9, 1), ("start", 0, 0), ("forward", 10, 0), ("after step", 10, 1)]):
            self.moment, self.batches, self.rank = where
            flag, self.flag = self.flag, f"{self.flag}{index}"
            before = index == 0 or Path(f"{flag}{index - 1}").exists()
            if before and (moment != "start" or index == 1):
                count, self.count = self.count, 0 if moment == "start" else self.count
                super().strike(moment)
                self.count = count
            self.flag = flag

    def on_train_start(self) -> None:
        self.strike("start")


def test_losses_in_a_row(calm, monkeypatch, tmp_path):
    supply, module = MendingSupply(monkeypatch), made(tmp_path / "run", kind=DiesAgain)
    trainer, logged = fit(module, tmp_path, max_failures=9)
    expected, rows_logged, seen = calm
    assert same(module, expected) and module.history == expected.history
    assert logged == rows_logged and rows(module.seen) == seen
    assert [found.source for found in trainer.recoveries] == ["what each worker had recorded"] * 3
    assert len(list(Path(module.flag).parent.glob("flag*"))) == 4
    assert len(supply.groups) == 5 and max(repeated(module.seen)) <= 3


class WritesATable(Struck):
    """Which then counts in what it computes, from its fifth batch on and by a way that leaves no version."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = torch.zeros(2**12)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.count >= 5:
            self.table.data.add_(0.01)
        return super().training_step(batch, batch_idx) * (1 + self.table[0])


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("batches", "source"), [(4, "what each worker had recorded"), (6, "a snapshot"), (10, "a snapshot")]
)
def test_a_device_says_later_that_a_table_has_been_written_to(batches, source, behind, monkeypatch, tmp_path):
    """Until that is known, a moment is none; afterwards whole states are copied."""
    monkeypatch.setattr("raytrainer.worker.written_tables._is_here", lambda tensor: False)
    MendingSupply(monkeypatch)
    expected = made(tmp_path / "calm", kind=WritesATable)
    _, expected_rows = fit(expected, tmp_path)
    module = made(tmp_path / "struck", 1, batches, "forward", kind=WritesATable)
    trainer, logged = fit(module, tmp_path)
    assert same(module, expected) and logged == expected_rows
    assert torch.equal(module.table, expected.table) and module.table[0] > 0
    (found,) = trainer.recoveries
    assert found.source == source
