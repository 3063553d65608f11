"""What is known of a dataset serves the next run, as long as its files are the same; without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytrainer.data.ray import prepared
from raytrainer.private import ray_private


class Data:
    """A dataset of these paths."""

    def __init__(self, *paths: Path) -> None:
        self.paths = [str(path) for path in paths]


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ray_private, "paths_read", lambda dataset: dataset.paths)
    monkeypatch.setattr(prepared, "_cluster", lambda: "this")
    yield
    prepared.forget()


def test_the_same_object_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    data, listed = Data(tmp_path), (object(), 3, 4)
    assert prepared.find(data, None) is None
    known = prepared.keep(data, ["x"], listed)
    assert known is not None and known.blocks is None
    assert prepared.find(data, ["x"]) is known and known.listed is listed
    assert prepared.find(data, None) is None  # other columns
    assert prepared.find(Data(tmp_path), ["x"]) is None  # another object
    prepared.keep_only([data])
    assert prepared.find(data, ["x"]) is known
    prepared.keep_only([])
    assert prepared.find(data, ["x"]) is None


@pytest.mark.parametrize("change", ["more", "other", "gone"])
def test_files_that_change(tmp_path: Path, change: str) -> None:
    (tmp_path / "a").write_text("1")
    data = Data(tmp_path)
    prepared.keep(data, None, (None, None, None))
    if change == "more":
        (tmp_path / "b").write_text("1")
    elif change == "other":
        (tmp_path / "a").write_text("12")
    else:
        (tmp_path / "a").unlink()
    assert prepared.find(data, None) is None


def test_another_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(tmp_path)
    prepared.keep(data, None, (None, None, None))
    monkeypatch.setattr(prepared, "_cluster", lambda: "another")
    assert prepared.find(data, None) is None


@pytest.mark.parametrize("path", ["s3://bucket/data", "/nowhere/at/all"])
def test_files_elsewhere_are_read_anew(path: str) -> None:
    data = Data(Path(path))
    data.paths = [path]
    assert prepared.keep(data, None, (None, None, None)) is None and prepared.find(data, None) is None
