"""What a worker's view of the run does not have is answered."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import raytrainer
from raytrainer.view.absent_names import absent
from raytrainer.view.trainer_view import TrainerView


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("is_last_batch", "batch_idx + 1 == self.trainer.num_training_batches"),
        ("log_dir", "the driver's Trainer has it"),
        ("checkpoint_callback", "the driver's Trainer has it"),
        ("globl_step", "did you mean 'global_step'?"),
        ("xyz", "self.trainer has no 'xyz' in a worker."),
    ],
)
def test_answers(name, said):
    assert said in absent(name, ["global_step", "max_steps", "_hidden"])


def test_all_that_the_driver_has_is_known():
    own = {*dir(TrainerView), *(field.name for field in dataclasses.fields(TrainerView))}
    for name in set(dir(raytrainer.Trainer)) - own:
        said = absent(name, [])
        assert name.startswith("_") or "the driver" in said or "here that is" in said, said


def test_asked_for_in_a_step(local_trainer):
    class Net(raytrainer.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            assert not hasattr(self.trainer, "is_last_batch")
            return self.trainer.is_last_batch

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(AttributeError, match=r"here that is batch_idx \+ 1 =="):
        local_trainer(max_epochs=1).fit(Net(), [torch.ones(1, 1)])
