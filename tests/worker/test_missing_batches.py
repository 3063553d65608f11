"""Batches that are None are skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Tiny
from torch.utils.data import DataLoader

from raytrainer.worker.missing_batches import MissingBatches

BAD = 2  # samples are numbered; batches that hold this one are dropped


def collate(samples: list[torch.Tensor]) -> torch.Tensor | None:
    batch = torch.stack(samples)
    return None if bool((batch == BAD).any()) else batch


def loader(samples: int = 8) -> DataLoader[Any]:
    return DataLoader(torch.arange(float(samples)), 2, collate_fn=collate)


class Seeing(Tiny):
    """Notes which batches its steps and hooks are given."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.seen: list[tuple[str, int, list[float]]] = []

    def note(self, what: str, batch: Any, batch_idx: int) -> None:
        self.seen.append((what, batch_idx, batch.tolist()))

    def on_train_batch_start(self, batch, batch_idx):
        self.note("start", batch, batch_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch + 0

    def training_step(self, batch, batch_idx):
        self.note("step", batch, batch_idx)
        self.log("mean", batch.mean(), on_epoch=True)
        loss = self(batch[:, None].expand(-1, 4)).mean()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.note("end", batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.note("val", batch, batch_idx)
        self.log("val", batch.mean())

    def predict_step(self, batch, batch_idx):
        return batch


@pytest.mark.parametrize("manual", [False, True])
def test_skipped(manual: bool, local_trainer, caplog) -> None:
    module = Seeing(manual)
    trainer = local_trainer(max_epochs=2, num_sanity_val_steps=0, log_every_n_steps=1)
    trainer.fit(module, loader(), loader())
    of_epoch = [(what, i, [2.0 * i, 2.0 * i + 1]) for i in (0, 2, 3) for what in ("start", "step", "end")]
    of_validation = [("val", i, [2.0 * i, 2.0 * i + 1]) for i in (0, 2, 3)]
    assert module.seen == (of_epoch + of_validation) * 2
    assert (
        trainer.callback_metrics["mean_epoch"]
        == trainer.callback_metrics["val"]
        == pytest.approx((0.5 + 4.5 + 6.5) / 3)
    )
    said = [r.getMessage() for r in caplog.records if "is None" in r.getMessage()]
    assert len([text for text in said if "train loader" in text]) == 1
    assert [batch.tolist() for batch in trainer.predict(module, loader())] == [[0, 1], [4, 5], [6, 7]]


def test_a_window_of_accumulation_goes_on_without_it(local_trainer) -> None:
    """The gradient is that of the window's other batch, divided as ever; a skipped first batch clears the old one."""

    class Gradients(Seeing):
        def on_before_optimizer_step(self, optimizer):
            self.seen.append(("gradient", 0, [self.layer.bias.grad.sum().item()]))

    module = Gradients()
    local_trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, loader(12))
    gradients = [values[0] for what, _, values in module.seen if what == "gradient"]
    assert gradients == pytest.approx([0.5, 1.0, 1.0])


def test_all_are_missing(local_trainer) -> None:
    module = Seeing()
    before = module.layer.weight.clone()
    trainer = local_trainer(max_epochs=1)
    trainer.fit(module, DataLoader(torch.full((4,), float(BAD)), 2, collate_fn=collate), loader(4))
    assert torch.equal(module.layer.weight, before)
    assert trainer.callback_metrics["val"] == 0.5


def test_what_needs_all_workers_is_skipped_by_all(caplog) -> None:
    others = iter([True, False, False])
    missing = MissingBatches("train", lambda flag: flag and next(others))
    assert [missing.checked(batch) for batch in (1, 2, None, 3)] == [1, None, None, None]
    (message,) = [r.getMessage() for r in caplog.records]
    assert "another worker" in message
