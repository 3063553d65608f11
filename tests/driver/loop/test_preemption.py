"""SIGTERM while a fit trains: a checkpoint of that very step, from which another run goes on as if nothing had been."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from tiny import Tiny, data

import raytrainer
from raytrainer.callbacks import Callback, ModelCheckpoint
from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.driver.saving import checkpoint_writer, preemption
from raytrainer.driver.saving.preemption import NAME, Preemption, default_grace
from raytrainer.errors import ConfigurationError

END = 128 + signal.SIGTERM


class Noisy(Tiny):
    """Draws random numbers in training and in validation; SIGTERM comes in `place`, once so many steps are done."""

    def __init__(self, place: str = "", step: int = 0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(4, 2)
        self.place, self.step = place, step

    def come_by(self, place: str) -> None:
        if place == self.place and self.global_step >= self.step:
            self.place = ""
            self.strike()

    def strike(self) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # who ends groups of processes may send several

    def training_step(self, batch, batch_idx):
        self.come_by("training_step")
        loss = super().training_step(batch, batch_idx) * (1 + 0.1 * torch.rand(()))
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        if batch_idx == 1:
            self.come_by("validation_step")
        self.log("val_loss", self.loss(batch) + torch.rand(()))

    def on_train_epoch_start(self):
        self.come_by("on_train_epoch_start")

    def on_train_epoch_end(self):
        self.come_by("on_train_epoch_end")

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss", "interval": "step", "frequency": 5},
        }


class Strikes(Callback):
    """SIGTERM comes while a driver's callback is told of a chunk."""

    def on_train_chunk_end(self, trainer, module, report):
        module.come_by("on_train_chunk_end")


def fit(folder, module, ckpt_path=None, **options):
    """Returns the trainer, and with what it has ended the process."""
    options = {"callbacks": [Strikes()], **options}
    trainer = raytrainer.Trainer(
        strategy="local", max_epochs=3, seed=5, val_check_interval=5, accumulate_grad_batches=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    try:
        trainer.fit(module, data(), data(), ckpt_path=ckpt_path)
    except SystemExit as end:
        return trainer, end.code
    return trainer, None


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    module = Noisy()
    trainer, _ = fit(tmp_path_factory.mktemp("calm"), module)
    return module.state_dict(), {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize(
    ("place", "step"),
    [
        ("training_step", 1),  # the first, and the gradients of half a step
        ("training_step", 4),
        ("training_step", 14),  # the last
        ("on_train_chunk_end", 2),
        ("on_train_chunk_end", 5),  # an epoch's batches are over, and its end is to come
        ("validation_step", 3),
        ("validation_step", 10),
        ("on_train_epoch_start", 5),
        ("on_train_epoch_end", 5),
        ("on_train_epoch_end", 15),
    ],
)
def test_no_step_is_lost(place, step, calm, tmp_path):
    module = Noisy(place, step)
    trainer, end = fit(tmp_path, module)
    assert end == END and trainer.preempted and trainer.interrupted and trainer.state.status == "interrupted"
    saved = tmp_path / "checkpoints" / NAME
    assert read_checkpoint(saved)["global_step"] == trainer.global_step >= step
    assert raytrainer.Trainer(strategy="local").preempted is False
    module = Noisy()
    resumed, end = fit(tmp_path, module, "last")
    assert end is None and not resumed.preempted and resumed.ckpt_path == str(saved)
    weights, metrics = calm
    assert all(torch.equal(one, weights[name]) for name, one in module.state_dict().items())
    assert {name: value.item() for name, value in resumed.callback_metrics.items()} == metrics


class Late(Noisy):
    """SIGTERM comes when the first epoch's checkpoint is there."""

    def __init__(self, folder: Path) -> None:
        super().__init__("training_step", 7)
        self.newest = folder / "checkpoints" / "epoch=0-step=5.ckpt"

    def strike(self) -> None:
        while not (self.newest / "meta.json").exists():
            time.sleep(0.01)
        super().strike()


class Endless(Late):
    """The step in which it comes does not end by itself."""

    def strike(self) -> None:
        super().strike()
        while True:
            time.sleep(0.01)


def test_what_does_not_fit_is_given_up(tmp_path, caplog):
    """A step that takes longer than there is time."""
    caplog.set_level("WARNING", logger="raytrainer")
    module = Endless(tmp_path)
    trainer, end = fit(tmp_path, module, preemption_grace=0.1)
    assert end == END and trainer.preempted
    newest = module.newest
    assert f'"last") goes on from the newest one, {newest}.' in caplog.text
    assert not (tmp_path / "checkpoints" / NAME).exists()
    resumed, _ = fit(tmp_path, Noisy(), "last")
    assert resumed.ckpt_path == str(newest) and resumed.global_step == 15


def test_nothing_half_written_is_left(tmp_path, caplog, monkeypatch):
    """A state that takes longer to write than there is time."""
    caplog.set_level("WARNING", logger="raytrainer")
    write = checkpoint_writer.write_checkpoint

    def slow(path, state, given_up):
        while Path(path).name == NAME and not given_up():
            time.sleep(0.01)
        write(path, state, given_up)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", slow)
    module = Late(tmp_path)
    trainer, end = fit(tmp_path, module, preemption_grace=0.1)
    assert end == END and trainer.preempted
    assert [path.name for path in module.newest.parent.iterdir()] == [module.newest.name]
    assert "of which there is no checkpoint" in caplog.text


@pytest.mark.parametrize("ended_by", [SystemExit, KeyboardInterrupt])
def test_its_name_is_given_back_where_time_is_over_before_it_is_begun(tmp_path, ended_by):
    def write(path):
        assert Path(path).is_dir()  # taken, so that no other run takes it
        raise ended_by

    saver = ModelCheckpoint(tmp_path)
    with pytest.raises(ended_by):
        Preemption(1.0, END).save([saver], write, 3, lambda: "now")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_told(tmp_path, caplog, monkeypatch):
    caplog.set_level("WARNING", logger="raytrainer")

    def full(path, state, given_up):
        raise raytrainer.CheckpointError("the disk is full")

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", full)
    trainer, end = fit(tmp_path, Noisy("training_step", 2))
    assert end == END and trainer.preempted
    assert "could not be saved: the disk is full" in caplog.text and "There is none at all yet." in caplog.text


class Orphaned(Noisy):
    """What SIGTERM has ended as well, such as loader processes, is missed before the step is over."""

    def strike(self) -> None:
        super().strike()
        raise RuntimeError("DataLoader worker exited unexpectedly")


def test_whoever_ends_loader_processes_too(calm, tmp_path):
    """In this process the state before the batch is still there."""
    trainer, end = fit(tmp_path, Orphaned("training_step", 7))
    assert end == END and trainer.preempted
    module = Noisy()
    resumed, _ = fit(tmp_path, module, "last")
    assert resumed.ckpt_path == str(tmp_path / "checkpoints" / NAME)
    assert all(torch.equal(one, calm[0][name]) for name, one in module.state_dict().items())


@pytest.mark.parametrize(
    ("options", "expected", "saves"),
    [
        ({"preemption_exit_code": 0}, 0, True),
        ({"preemption_exit_code": None}, None, True),
        ({"preemption_grace": 0}, END, False),
        ({"enable_checkpointing": False}, END, False),
    ],
)
def test_how_the_process_ends(options, expected, saves, tmp_path):
    trainer, end = fit(tmp_path, Noisy("training_step", 3), **options)
    assert end == expected and trainer.preempted and trainer.global_step < 15
    assert (tmp_path / "checkpoints" / NAME).exists() == saves
    assert trainer.state.status == "interrupted"


def test_one_name_for_all_preemptions(tmp_path):
    for step in (2, 7, 12):
        trainer, _ = fit(
            tmp_path, Noisy("training_step", step), "last", callbacks=ModelCheckpoint(tmp_path, save_top_k=0)
        )
        assert read_checkpoint(tmp_path / NAME)["global_step"] == trainer.global_step
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_the_preemption_of_another_run_stays(tmp_path, monkeypatch):
    """Two runs that share a folder, and whose machine is wanted back; then each goes on, and is preempted again."""
    monkeypatch.chdir(tmp_path)
    names = [NAME, "preempted-v1.ckpt"]

    def preempted(step, ckpt_path=None):
        fit(tmp_path, Noisy("training_step", step), ckpt_path, callbacks=ModelCheckpoint(tmp_path, save_top_k=0))
        return {path.name: read_checkpoint(path)["global_step"] for path in tmp_path.iterdir()}

    first = preempted(2)
    both = preempted(4)
    assert sorted(both) == sorted(names) and first.items() <= both.items() and both[names[1]] >= 4
    # its own, by a relative path; the other one is younger, and another run's
    assert preempted(9, NAME) == {NAME: 10, names[1]: both[names[1]]}
    assert preempted(12, "last") == {NAME: 12, names[1]: both[names[1]]}
    (tmp_path / "kept").mkdir()
    (tmp_path / NAME).rename(tmp_path / "kept" / NAME)  # archived, with a link in its place
    (tmp_path / NAME).symlink_to(tmp_path / "kept" / NAME)
    fit(tmp_path, Noisy("training_step", 13), NAME, callbacks=ModelCheckpoint(tmp_path, save_top_k=0))
    assert read_checkpoint(tmp_path / "kept" / NAME)["global_step"] == 12
    assert read_checkpoint(tmp_path / "preempted-v2.ckpt")["global_step"] > 12


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [({}, 20), ({preemption.OF_A_JOB: "{}"}, 2.25), ({preemption.OF_A_JOB: "{}", "RAY_JOB_STOP_WAIT_TIME_S": "8"}, 6)],
)
def test_the_time_there_is(environment, seconds, monkeypatch):
    for name in (preemption.OF_A_JOB, "RAY_JOB_STOP_WAIT_TIME_S"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_grace() == Preemption().seconds([ModelCheckpoint()]) == seconds
    assert Preemption(4).seconds([ModelCheckpoint()]) == 4 and Preemption(4).seconds([]) == 0


@pytest.mark.parametrize("options", [{"preemption_grace": -1}, {"preemption_exit_code": 300}])
def test_bad_values(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        raytrainer.Trainer(strategy="local", **options)
