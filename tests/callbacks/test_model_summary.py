from __future__ import annotations

import pytest
import torch
from torch import nn

from raytrainer.callbacks.model_summary import ModelSummary, ModuleRow, plain_text, summarize, total
from raytrainer.errors import ConfigurationError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False))
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.body[1].weight
        self.scale = nn.Parameter(torch.zeros(5, dtype=torch.float64), requires_grad=False)
        self.head.eval()


def test_rows_by_depth():
    body, head = ModuleRow("body", "Sequential", 32, "train"), ModuleRow("head", "Linear", 16, "eval")
    inner = [ModuleRow("body.0", "Linear", 16, "train"), ModuleRow("body.1", "Linear", 16, "train")]
    assert summarize(Net(), 0) == []
    assert summarize(Net(), 1) == [body, head]
    assert summarize(Net(), 2) == summarize(Net(), -1) == [body, *inner, head]


def test_totals_count_shared_parameters_once():
    totals = total(Net())
    assert (totals.trainable, totals.frozen, totals.params) == (32, 5, 37)
    assert totals.megabytes == pytest.approx((32 * 4 + 5 * 8) / 1e6)


def test_lazy_parameters():
    module = nn.Sequential(nn.LazyLinear(3), nn.Linear(1, 1))
    assert summarize(module)[0] == ModuleRow("0", "LazyLinear", 0, "train", lazy=True)
    assert total(module).lazy and total(module).params == 2
    text = plain_text(summarize(module), total(module))
    assert "lazy" in text and "not counted" in text


def test_prints_plain_text_without_a_terminal(capsys):
    ModelSummary().on_fit_start(None, nn.Sequential(nn.Linear(999, 1000), nn.ReLU()))
    out = capsys.readouterr().out
    assert "0  0     Linear   1.0 M  train" in out and "1.0 M trainable, 0 non-trainable" in out and "4.0 MB" in out
    assert "\x1b" not in out
    ModelSummary(0).on_fit_start(None, nn.Linear(2, 2))
    assert capsys.readouterr().out == "6 trainable, 0 non-trainable parameters\n6 parameters in total, 0.000 MB\n"


def test_bad_depth():
    with pytest.raises(ConfigurationError, match="-2"):
        ModelSummary(-2)
