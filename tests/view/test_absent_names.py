"""What a worker's view of the run does not have is answered."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import Tiny, data

import raytrainer
from raytrainer.plan.run_arguments import RunArguments
from raytrainer.view.absent_names import absent
from raytrainer.view.trainer_view import TrainerView


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("state", "self.trainer.stage and self.trainer.running"),
        ("plot", "the driver's Trainer has it"),
        ("checkpoint_callback", "the driver's Trainer has it"),
        ("globl_step", "did you mean 'global_step'?"),
        ("xyz", "self.trainer has no 'xyz' in a worker."),
    ],
)
def test_answers(name, said):
    assert said in absent(name, ["global_step", "max_steps"])


def test_all_that_the_driver_has_is_known():
    own = {
        *dir(TrainerView),
        *(field.name for kind in (TrainerView, RunArguments) for field in dataclasses.fields(kind)),
    }
    for name in set(dir(raytrainer.Trainer)) - own:
        said = absent(name, [])
        assert name.startswith("_") or "the driver" in said or "here that is" in said, said


def test_asked_for_in_a_step(local_trainer):
    class Net(raytrainer.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            assert not hasattr(self.trainer, "state")
            return self.trainer.state

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(AttributeError, match=r"here that is self\.trainer\.stage"):
        local_trainer(max_epochs=1).fit(Net(), [torch.ones(1, 1)])


@pytest.mark.parametrize("loader", ["sized", "unsized"])
def test_names_of_lightnings_trainer_that_modules_ask_for(loader, local_trainer, tmp_path):
    class Net(raytrainer.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(1, 1)
            self.last: list[bool] = []

        def training_step(self, batch, batch_idx):
            trainer = self.trainer
            assert (trainer.limit_train_batches, trainer.val_check_interval, trainer.num_sanity_val_steps) == (
                3,
                0.5,
                0,
            )
            assert not trainer.evaluating and trainer.log_dir == folder
            self.last.append(trainer.is_last_batch)
            return self.net(batch).sum()

        def validation_step(self, batch, batch_idx):
            assert self.trainer.evaluating and not self.trainer.training

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    batches = [torch.ones(1, 1)] * 4
    train = batches if loader == "sized" else torch.utils.data.DataLoader(Endless(), batch_size=None)
    for logger in (False, raytrainer.CSVLogger(tmp_path)):
        trainer = local_trainer(
            max_epochs=2, limit_train_batches=3, val_check_interval=0.5, num_sanity_val_steps=0, logger=logger
        )
        folder = trainer.log_dir
        assert folder == (logger.log_dir if logger else trainer.default_root_dir)
        module = Net()
        trainer.fit(module, train, batches)
        assert module.last == [False, False, True] * 2


class Endless(torch.utils.data.IterableDataset[torch.Tensor]):
    def __iter__(self):
        return iter([torch.ones(1, 1)] * 9)


def test_what_fails_as_loaders_are_made_is_told_as_it_is(local_trainer):
    class Asks(Tiny):
        def training_step(self, batch, batch_idx):
            return self.trainer.test_dataloaders

        def test_dataloader(self):
            return self.rows

    with pytest.raises(AttributeError, match="'Asks' object has no attribute 'rows'"):
        local_trainer(max_epochs=1).fit(Asks(), data())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("should_sotp", r"self\.trainer\.should_sotp = \.\.\.: there is no 'should_sotp'; did you mean 'should_stop'"),
        ("shouldstop", "did you mean 'should_stop'"),
        ("global_steps", "did you mean 'global_step'"),
        ("limit_train_batch", "did you mean 'limit_train_batches'"),
        ("limit_val_batches", r"stays as it is once the run has begun: write Trainer\(limit_val_batches=3, \.\.\.\)"),
        ("max_epochs", r"stays as it is once the run has begun: write Trainer\(max_epochs=3"),
        ("training", "no setter"),
    ],
)
@pytest.mark.parametrize("where", ["training_step", "on_validation_epoch_end"])
def test_set_in_vain(name, said, where, local_trainer):
    class Net(Tiny):
        pass

    def hook(self, *args):
        setattr(self.trainer, name, 3)

    setattr(Net, where, hook)
    trainer = local_trainer(max_epochs=1, limit_val_batches=1)
    with pytest.raises(AttributeError, match=said):
        trainer.fit(Net(), data(), data())


def test_attributes_of_users_own(local_trainer):
    class Net(Tiny):
        def training_step(self, batch, batch_idx):
            self.trainer.seen = batch_idx
            self.trainer._seen = self.trainer.stopped_by_me = "x"
            for name in ("logger2", "loggers_", "steps", "model_", "optimizer", "metric", "mode", "rank", "seens"):
                setattr(self.trainer, name, batch_idx)
            self.trainer.should_stop = True
            return super().training_step(batch, batch_idx)

        def on_train_end(self):
            assert (self.trainer.seen, self.trainer._seen, self.trainer.stopped_by_me) == (batches - 1, "x", "x")
            assert self.trainer.logger2 == self.trainer.mode == batches - 1

    batches = len(data())
    trainer = local_trainer(max_epochs=9)
    trainer.fit(Net(), data())
    assert trainer.current_epoch == 1
