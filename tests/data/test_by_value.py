"""Loader processes that import classes by name, where these have none: in a notebook."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from raytrainer.data.by_value import start_by_value
from raytrainer.data.feed import Feed
from raytrainer.data.sharding import Share
from raytrainer.plan.settings import build_settings


@pytest.mark.sample(1)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_classes_of_a_notebook(method, monkeypatch):
    class Cell(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor(index)

    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)  # as in a notebook
    loader = DataLoader(Cell(), 3, num_workers=1, multiprocessing_context=method)
    feed = Feed(loader, "train", Share(0, 1), 1, build_settings())
    assert [batch.tolist() for batch in feed.start(0)] == [[0, 1, 2], [3, 4, 5]]
    feed.close()


@pytest.mark.parametrize("options", [{"multiprocessing_context": "fork", "num_workers": 1}, {"num_workers": 0}])
def test_processes_that_need_nothing(options, monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)  # as in a notebook
    loader = DataLoader([1], **options)
    before = loader.multiprocessing_context
    start_by_value(loader)
    assert loader.multiprocessing_context is before


def test_a_script_is_read_again(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)  # pytest-xdist's has none
    loader = DataLoader([1], num_workers=1, multiprocessing_context="spawn")
    before = loader.multiprocessing_context
    start_by_value(loader)
    assert loader.multiprocessing_context is before
