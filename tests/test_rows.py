"""The loggers' axis: at which step rows of batches, epochs and validations stand, and what is in them."""

from __future__ import annotations

import pytest
import torch
from test_logging import Rows
from tiny import Tiny, data


class Stepping(Tiny):
    """Logs in hooks that not every batch has; two optimizers of its own, or none."""

    def __init__(self, manual):
        super().__init__()
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("each", float(batch_idx), on_step=True, on_epoch=True)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def on_before_zero_grad(self, optimizer):
        self.log("opened", 10.0 * self.global_step)

    def validation_step(self, batch, batch_idx):
        self.log("val", 1.0)

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.log("end", 7.0)

    def on_train_end(self):
        self.at_end = dict(self.trainer.callback_metrics)

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(self.parameters(), 0.1) for _ in range(1 if self.automatic_optimization else 2)]
        return optimizers if len(optimizers) > 1 else optimizers[0]


def _steps(logger, name):
    return [step for step, values in logger.rows if name in values]


@pytest.mark.parametrize(
    ("manual", "accumulate", "validated", "ended"), [(False, 1, [3, 7], 9), (False, 4, [0, 1], 2), (True, 1, [3, 7], 9)]
)
def test_rows_of_steps_epochs_and_validations_share_one_axis(manual, accumulate, validated, ended, local_trainer):
    """As recorded with Lightning 2.6.6; the axis counts batches that step, whatever steps they make."""
    logger, module = Rows(), Stepping(manual)
    trainer = local_trainer(
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        val_check_interval=4,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=logger,
    )
    trainer.fit(module, data(), data(4))
    assert _steps(logger, "each_step") == list(range(ended + 1))
    assert _steps(logger, "val") == validated
    assert _steps(logger, "each_epoch") == _steps(logger, "end") == [ended]
    if not manual:  # logged as the first of the accumulated batches begins
        opened = [(step, values["opened"]) for step, values in logger.rows if "opened" in values]
        assert opened == [(step, 10.0 * step) for step in range(ended + 1)]
    assert module.at_end["end"] == 7.0


def test_logged_metrics_are_the_latest_whether_or_not_a_row_has_them(local_trainer):
    logger, module = Rows(), Stepping(False)
    trainer = local_trainer(max_epochs=1, log_every_n_steps=4, logger=logger)
    trainer.fit(module, data())
    assert _steps(logger, "each_step") == [3, 7]
    assert trainer.logged_metrics["each_step"] == 9.0
