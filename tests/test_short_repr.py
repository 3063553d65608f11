"""How callbacks, loggers, profilers and DataModules show themselves: short, and with what they were made with."""

from pathlib import Path

import pytest
import torch

import raytrainer as rt


class Digits(rt.DataModule):
    def __init__(self, dataset, folder, batch_size=32, sizes=(1, 2), label=None):
        super().__init__()
        self.dataset, self.folder, self.batch_size, self.sizes, self._label = dataset, folder, batch_size, sizes, label


class Own(rt.WorkerCallback):
    def __init__(self, *names, every=2, **more):
        self.names, self.every, self.more = names, every, more


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (rt.EarlyStopping("val_loss"), "EarlyStopping(monitor='val_loss')"),
        (
            rt.EarlyStopping("val_loss", patience=5, mode="max"),
            "EarlyStopping(monitor='val_loss', patience=5, mode='max')",
        ),
        (rt.ModelSummary(), "ModelSummary()"),
        (rt.SimpleProfiler(), "SimpleProfiler()"),
        (rt.DataModule(), "DataModule()"),
        (rt.Callback(), "Callback()"),
        (Digits(torch.zeros(2), Path("a/b"), label="x"), "Digits(folder='a/b', label='x')"),
        (
            Digits([1, "2", None], "f", 3, {"a": (1, 2)}),
            "Digits(dataset=[1, '2', None], folder='f', batch_size=3, sizes={'a': (1, 2)})",
        ),
        (Digits("x" * 500, "f"), f"Digits(dataset='{'x' * 37}...{'x' * 38}', folder='f')"),
        (Own("a", every=3, more=2), "Own(names=('a',), every=3, more={'more': 2})"),
    ],
)
def test_shown(made, shown):
    assert repr(made) == shown


def test_a_logger_makes_no_folder_to_be_shown(tmp_path):
    assert repr(rt.CSVLogger(tmp_path, name="a")).endswith("', name='a')")
    assert list(tmp_path.iterdir()) == []


def test_secrets_are_not_shown():
    class Service(rt.CSVLogger):
        def __init__(self, api_key, project):
            self.api_key, self.project = api_key, project

    assert repr(Service("k-123", "digits")) == "Service(project='digits')"
