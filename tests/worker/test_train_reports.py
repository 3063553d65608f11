"""What a training loop reports beside its chunks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from raytrainer.worker.train_reports import has_trained


@pytest.mark.parametrize(
    ("without_loss", "began", "batch", "step", "trained"),
    [
        (0, (0, 0, 0), 8, 8, True),
        (8, (0, 0, 0), 8, 0, False),
        (9, (3, 3, 5), 8, 4, True),
        (10, (3, 3, 5), 8, 3, False),
        (0, (8, 8, 0), 8, 8, True),  # lost workers had done all of the epoch
        (0, (0, 8, 0), 0, 8, False),  # an epoch without batches
        (None, (0, 4, 0), 8, 5, True),
        (None, (0, 4, 0), 8, 4, False),
        (None, (8, 4, 0), 8, 4, True),
    ],
)
def test_whether_an_epoch_has_trained(without_loss, began, batch, step, trained):
    optimization = SimpleNamespace() if without_loss is None else SimpleNamespace(without_loss=without_loss)
    assert has_trained(optimization, began, batch, step) is trained
