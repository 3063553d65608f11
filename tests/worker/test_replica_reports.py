"""What a worker says of its optimizers' settings, whatever these keep in their groups."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from raytrainer.worker.replica_reports import _plain


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.5, 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.nn.Parameter(torch.tensor([0.5])), 0.5),
        (torch.tensor([0.5, 0.25]), (0.5, 0.25)),
        ([0.5, torch.tensor(0.25)], (0.5, 0.25)),
        ((None, 1e-3), (None, 1e-3)),
        (np.float64(0.5), 0.5),
        (np.array([0.5, 0.25]), (0.5, 0.25)),
        (lambda step: 0.5, "function"),
        ("auto", "auto"),
        (True, True),
    ],
    ids=lambda value: "function" if callable(value) and not isinstance(value, torch.Tensor) else str(value),
)
def test_a_setting_is_told_as_plain_values(value, said):
    told = _plain(value)
    assert told == said and type(told) is type(said)
    assert pickle.loads(pickle.dumps(told)) == told
