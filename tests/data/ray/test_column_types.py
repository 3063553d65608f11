"""Columns keep their types in every batch, or an error names them; without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from raytrainer.data.ray import blocks as ray_data
from raytrainer.data.ray.columns import views
from raytrainer.data.ray.ray_feed import RayFeed
from raytrainer.data.sharding import Share
from raytrainer.errors import DataError
from raytrainer.plan.settings import build_settings

LARGE = 2**53 + 1


def batches(columns: list[Any], shuffle: bool, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """What a worker reads of blocks with these values of a column "x", two rows a batch."""
    tables = [pa.table({"x": column}) for column in columns]
    monkeypatch.setattr(ray_data, "_fetch", lambda ref, source: views(ref, source.columns))
    defaults = {"columns": None, "dtypes": None, "collate_fn": None, "prefetch_batches": 0, "drop_last": False}
    source: Any = SimpleNamespace(**{**defaults, "dataset": None, "batch_size": 2, "shuffle": shuffle, **options})
    blocks = ray_data.KeptBlocks(source, tables, [len(table) for table in tables])
    return list(RayFeed(blocks, "train", Share(0, 1), 5, build_settings()).start(0))


def values(found: list[Any]) -> list[Any]:
    rows = (value for batch in found for value in batch["x"].tolist())
    return sorted((row.tolist() if isinstance(row, np.ndarray) else row for row in rows), key=str)


WITH_NULLS = {
    "int64": [pa.array([1, LARGE]), pa.array([3, None])],
    "int8": [pa.array([1, 2], pa.int8()), pa.array([None, None], pa.int8())],
    "bool": [pa.array([True, False]), pa.array([None, True])],
    "lists": [pa.array([[1, 2], [3, 4]]), pa.array([[5, LARGE], [None, 8]])],
    "fixed lists": [pa.array([[1, 2], [3, None]], pa.list_(pa.int64(), 2))],
    "fixed lists, missing": [pa.array([[1, LARGE], None], pa.list_(pa.int64(), 2))],
    "lists of fixed lists, missing": [pa.array([[[1, LARGE], None]], pa.list_(pa.list_(pa.int64(), 2)))],
    "dictionaries": [pa.array([1, LARGE]).dictionary_encode(), pa.array([3, None]).dictionary_encode()],
}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", WITH_NULLS)
def test_whole_numbers_with_nulls(kind: str, shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = WITH_NULLS[kind]
    with pytest.raises(DataError, match=r"column 'x' holds .*collate_fn"):
        batches(columns, shuffle, monkeypatch)
    found = batches(columns, shuffle, monkeypatch, collate_fn=lambda batch: batch)
    wanted = sorted((value for column in columns for value in column.to_pylist()), key=str)
    assert values(found) == wanted
    assert not any(batch["x"].dtype.kind == "f" for batch in found)


def test_nulls_as_nan_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [pa.array([1, 2]), pa.array([3, None])]
    with pytest.raises(DataError, match=r"with nulls.*dtypes=\{'x': torch\.float64\}"):
        batches(columns, False, monkeypatch, dtypes=torch.float64)  # is for floating-point columns
    found = batches(columns, False, monkeypatch, dtypes={"x": torch.float64})
    assert torch.equal(torch.cat([b["x"] for b in found]).nan_to_num(-1), torch.tensor([1.0, 2, 3, -1]).double())


def test_floating_point_nulls_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    found = batches([pa.array([1.5, None])], False, monkeypatch)
    assert found[0]["x"].dtype == torch.float64 and found[0]["x"].isnan().tolist() == [False, True]


@pytest.mark.parametrize("shuffle", [False, True])
def test_integers_here_and_floats_there(shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks from pandas, which makes floats of integers with nulls."""
    with pytest.raises(DataError, match="column 'x' holds float64 and int64 in different blocks"):
        batches([pa.array([1, LARGE]), pa.array([3.0, float("nan")])], shuffle, monkeypatch)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_lists_of_another_length_in_another_file(shuffle: bool, fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def column(rows: list[list[int]]) -> Any:
        return pa.array(rows, pa.list_(pa.int64(), len(rows[0]))) if fixed else pa.array(rows)

    columns = [column([[1, 2], [3, 4], [5, 6]]), column([[7, 8, 9]])]
    with pytest.raises(DataError, match=r"column 'x' holds arrays of varying shape.*collate_fn"):
        batches(columns, shuffle, monkeypatch)
    found = batches(columns, shuffle, monkeypatch, collate_fn=lambda batch: [row.tolist() for row in batch["x"]])
    assert sorted(row for batch in found for row in batch) == [[1, 2], [3, 4], [5, 6], [7, 8, 9]]


@pytest.mark.parametrize("kind", ["int64", "uint64", "dictionary"])
def test_whole_numbers_stay_exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [pa.array(column, pa.uint64() if kind == "uint64" else None) for column in ([1, LARGE], [3, 4])]
    columns = [column.dictionary_encode() if kind == "dictionary" else column for column in columns]
    found = batches(columns, True, monkeypatch)
    assert values(found) == sorted([1, 3, 4, LARGE], key=str)
    assert all(batch["x"].dtype == (torch.uint64 if kind == "uint64" else torch.int64) for batch in found)
