"""A run that dies and is started again ends as if it had never died: weights, buffers, logged values, bit for bit."""

from __future__ import annotations

import copy
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from exact import Died, Exact, run, same
from forked_group import FORK
from tiny import Tiny, data, weights
from torch.utils.data import DataLoader

import raytrainer
from raytrainer.callbacks import ModelCheckpoint
from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    module = Exact()
    trainer, rows = run(module, tmp_path_factory.mktemp("undisturbed"))
    return module, trainer, rows


# an epoch has 14 batches, 7 steps, validations after 7 and 14 batches
@pytest.mark.sample(8)
@pytest.mark.parametrize("batches", [3, 7, 8, 13, 14, 15, 22, 28, 29, 41])
@pytest.mark.parametrize("save_every", [1, 3])
def test_resumed_after_dying_anywhere(undisturbed, tmp_path, batches, save_every):
    calm, calm_trainer, rows = undisturbed
    with pytest.raises(Died):
        run(Exact((0, batches), flag=f"{tmp_path}/flag"), tmp_path, save_every=save_every)
    module = Exact()
    trainer, resumed_rows = run(module, tmp_path, save_every=save_every, ckpt_path="last")
    assert same(module, calm)
    assert trainer.global_step == calm_trainer.global_step == 21
    assert trainer.current_epoch == 3
    # what was logged after the resumption is what the undisturbed run logged there
    assert resumed_rows == rows[len(rows) - len(resumed_rows) :]
    if batches > 4 * save_every:  # by then something had been logged
        assert len(resumed_rows) < len(rows)


def test_a_validation_that_dies_is_repeated(undisturbed, tmp_path):
    calm, _, rows = undisturbed
    with pytest.raises(Died):
        run(Exact((0, 21), flag=f"{tmp_path}/flag", verb="validate"), tmp_path, save_every=1)
    module = Exact()
    _, resumed_rows = run(module, tmp_path, save_every=1, ckpt_path="last")
    assert same(module, calm)
    assert resumed_rows == rows[len(rows) - len(resumed_rows) :]


def _last(folder: Path, die: tuple[int, int] | None) -> None:
    """What a script does that goes on from the last checkpoint, if there is one."""
    torch.set_num_threads(1)
    module = Exact(die, "kill", f"{folder}/flag")
    run(module, folder, save_every=1, ckpt_path="last", num_workers=2)
    torch.save(module.state_dict(), folder / "end.pt")


def test_loader_processes_and_sigkill(tmp_path):
    """The whole process is killed while loader processes augment; the same script goes on with ckpt_path="last"."""

    def start(folder: Path, die: tuple[int, int] | None) -> BaseProcess:
        folder.mkdir(exist_ok=True)
        process = FORK.Process(target=_last, args=(folder, die))
        process.start()
        return process

    calm, struck = start(tmp_path / "calm", None), start(tmp_path / "struck", (0, 17))
    struck.join(120)
    assert struck.exitcode == -9
    resumed = start(tmp_path / "struck", (0, 17))
    for process in (calm, resumed):
        process.join(120)
        assert process.exitcode == 0
    expected, found = (torch.load(tmp_path / name / "end.pt") for name in ("calm", "struck"))
    assert expected.keys() == found.keys() != set()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_last_without_a_checkpoint_begins_at_the_beginning(undisturbed, tmp_path):
    module = Exact()
    run(module, tmp_path, save_every=5, ckpt_path="last")
    assert same(module, undisturbed[0])


def test_a_checkpoint_holds_gradients_while_accumulating(undisturbed, tmp_path):
    """Saved between two batches of one step: the first batch's gradient must not be lost."""
    from raytrainer import Callback

    class SaveNow(Callback):
        def on_validation_end(self, trainer, module):
            if trainer._state.progress.total_batches == 7:  # an odd batch, in the middle of an accumulation
                trainer.save_checkpoint(f"{tmp_path}/odd.ckpt")

    run(Exact(), tmp_path, callbacks=[SaveNow()])
    module = Exact()
    run(module, tmp_path, ckpt_path=f"{tmp_path}/odd.ckpt")
    assert same(module, undisturbed[0])


class Counting(raytrainer.Module):
    """Counts batches, and validates."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.batches = 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Reads(Counting):
    def __init__(self):
        super().__init__()
        self.read = []

    def training_step(self, batch, batch_idx):
        self.read += batch[:, 0].tolist()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("size", [1, 8])
def test_another_batch_size_goes_on_with_the_samples_that_are_left(size, local_trainer, tmp_path):
    def data(batch_size):
        return DataLoader(torch.arange(32.0).reshape(-1, 1).expand(-1, 2), batch_size, shuffle=True)

    first, second = Reads(), Reads()
    saver = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True, every_n_train_steps=4)
    local_trainer(max_steps=4, seed=1, callbacks=saver, enable_checkpointing=True).fit(first, data(4))
    local_trainer(max_epochs=1, seed=1).fit(second, data(size), ckpt_path=tmp_path / "last.ckpt")
    assert sorted(first.read + second.read) == list(range(32))
    assert second.batches == 16 // size


def test_a_batch_size_that_grows_from_epoch_to_epoch_is_that_of_the_epoch(local_trainer, tmp_path):
    class Grows(Reads):
        def train_dataloader(self):
            rows = torch.arange(32.0).reshape(-1, 1).expand(-1, 2)
            return DataLoader(rows, 4 * 2**self.current_epoch, shuffle=True)

    options = {"seed": 1, "reload_dataloaders_every_n_epochs": 1}
    saver = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True, every_n_train_steps=10)
    local_trainer(max_steps=10, callbacks=saver, enable_checkpointing=True, **options).fit(first := Grows())
    local_trainer(max_epochs=2, **options).fit(second := Grows(), ckpt_path=tmp_path / "last.ckpt")
    assert sorted(first.read + second.read) == sorted(2 * [*range(32)])
    assert (first.batches, second.batches) == (10, 2)


@pytest.mark.parametrize("drop_last", [False, True])
def test_nothing_is_left_for_another_number_of_workers(local_trainer, tmp_path, drop_last):
    """The epoch ends, is validated, and the next one begins; a row too few for a batch is no error."""
    loader = DataLoader(torch.ones(9 if drop_last else 8, 2), batch_size=2, drop_last=drop_last)
    saver = ModelCheckpoint(tmp_path, save_top_k=0, save_last=True, every_n_train_steps=2)
    local_trainer(max_steps=2, callbacks=saver).fit(Counting(), loader, loader)
    # as two workers would have saved it, who have done two batches each
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    write_checkpoint(tmp_path / "two.ckpt", {**checkpoint, "parts": 2, "world_size": 2})

    validations = []
    module = Counting()
    watch = raytrainer.LambdaCallback(on_validation_end=lambda trainer, module: validations.append(trainer.global_step))
    trainer = local_trainer(max_epochs=2, callbacks=watch)
    trainer.fit(module, loader, loader, ckpt_path=str(tmp_path / "two.ckpt"))
    assert (trainer.current_epoch, trainer.global_step) == (2, 6)
    assert module.batches == 4  # of the second epoch
    assert validations == [2, 6]


class FailsAtAnEpochsEnd(Tiny):
    def __init__(self, fails):
        super().__init__()
        self.fails, self.rates = fails, []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        if self.fails and self.trainer.global_step == 20:
            raise OSError("of the user's")

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def test_a_scheduler_is_stepped_once_for_an_epoch_whose_last_batch_failed(local_trainer, tmp_path):
    torch.manual_seed(1)
    calm = FailsAtAnEpochsEnd(False)
    failed, again = copy.deepcopy(calm), copy.deepcopy(calm)
    failed.fails = True
    local_trainer(max_epochs=3).fit(calm, data())
    saver = raytrainer.ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=9)
    with pytest.raises(OSError, match="of the user's"):
        local_trainer(max_epochs=3, callbacks=saver).fit(failed, data())
    (path,) = tmp_path.glob("*.ckpt")
    local_trainer(max_epochs=3).fit(again, data(), ckpt_path=path)
    assert again.rates == calm.rates[20:] and torch.equal(weights(again), weights(calm))
