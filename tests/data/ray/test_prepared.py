"""What is known of a dataset serves the next run, as long as its files are the same; without Ray."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
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


def keep(data: Data, columns: list[str] | None = None, listed: Any = (None, None, None)) -> Any:
    return prepared.keep(data, columns, listed, prepared.files_of(data))


def test_the_same_object_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    data, listed = Data(tmp_path), (object(), 3, 4)
    assert prepared.find(data, None) is None
    known = keep(data, ["x"], listed)
    assert known is not None and known.blocks is None
    assert prepared.find(data, ["x"]) is known and known.listed is listed
    assert prepared.find(data, None) is None  # other columns
    assert prepared.find(Data(tmp_path), ["x"]) is None  # another object
    prepared.keep_only([data])
    assert prepared.find(data, ["x"]) is known
    prepared.keep_only([])
    assert prepared.find(data, ["x"]) is None


@pytest.mark.parametrize("change", ["more", "other", "gone", "replaced", "written over", "behind a link"])
def test_files_that_change(tmp_path: Path, change: str) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.mkdir()
    (folder / "a").write_text("1")
    (elsewhere / "c").write_text("1")
    (folder / "link").symlink_to(elsewhere)
    (folder / "back").symlink_to(folder)
    data = Data(folder)
    keep(data)
    assert prepared.find(data, None) is not None
    times = os.stat(folder / "a")
    if change == "more":
        (folder / "b").write_text("1")
    elif change == "other":
        (folder / "a").write_text("12")
    elif change == "gone":
        (folder / "a").unlink()
    elif change == "replaced":  # as rsync and mv do it
        (folder / "new").write_text("2")
        os.utime(folder / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
        (folder / "new").rename(folder / "a")
    elif change == "written over":
        (folder / "a").write_text("2")
        os.utime(folder / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        (elsewhere / "c").write_text("12")
    assert prepared.find(data, None) is None


def test_files_that_change_while_they_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    data = Data(tmp_path)
    files = prepared.files_of(data)
    (tmp_path / "a").write_text("12")
    prepared.keep(data, None, (None, None, None), files)
    assert prepared.find(data, None) is None


def test_another_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(tmp_path)
    keep(data)
    monkeypatch.setattr(prepared, "_cluster", lambda: "another")
    assert prepared.find(data, None) is None


@pytest.mark.parametrize("path", ["s3://bucket/data", "/nowhere/at/all"])
def test_files_elsewhere_are_read_anew(path: str) -> None:
    data = Data(Path(path))
    data.paths = [path]
    assert keep(data) is None and prepared.find(data, None) is None


@pytest.mark.parametrize("local", [True, False])
def test_paths_of_another_filesystem_are_not_looked_for_here(
    tmp_path: Path, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = pyarrow.fs.LocalFileSystem()
    filesystem = here if local else pyarrow.fs.SubTreeFileSystem(str(tmp_path / "mounted"), here)

    class ListFiles(SimpleNamespace):
        pass

    plan = ListFiles(input_dependencies=[], paths=[str(tmp_path)], filesystem=filesystem)
    monkeypatch.undo()
    found = ray_private.paths_read(SimpleNamespace(_logical_plan=SimpleNamespace(dag=plan)))
    assert found == ([str(tmp_path)] if local else None)
