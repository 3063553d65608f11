"""What a worker's process takes over of the driver's."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace

import pytest
import torch

from raytrainer.driver.cluster import inherited
from raytrainer.driver.workers.edited_modules import EditedModules
from raytrainer.private import ray_private
from raytrainer.worker.actor.own_modules import stamps
from raytrainer.worker.actor.surroundings import Surroundings, merged_path


@pytest.mark.parametrize(
    ("own", "theirs", "expected"),
    [
        (["/w", "/lib", "/site"], ["/s", "/src", "/lib", "/site"], ["/w", "/s", "/src", "/lib", "/site"]),
        (["/lib", "/site"], ["/lib", "/site", "/more"], ["/lib", "/site", "/more"]),
        (["/lib", "/site"], ["/site", "/lib"], ["/lib", "/site"]),
        ([], ["/a", "/b"], ["/a", "/b"]),
        (["/a"], ["/b", "/a", "/c"], ["/b", "/a", "/c"]),
    ],
)
def test_folders_of_modules_keep_their_order(own, theirs, expected):
    assert merged_path(own, theirs) == expected


def test_they_are_adopted_and_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before = Surroundings.of_this_process()
    monkeypatch.setenv("TO_GO", "x")
    (tmp_path / "src").mkdir()
    logging.getLogger("of_a_test").setLevel(logging.NOTSET)
    theirs = replace(
        before, path=[str(tmp_path / "src"), str(tmp_path / "absent"), *before.path], folder=str(tmp_path / "src"),
        dtype=torch.float64, matmul_precision="high", levels={"of_a_test": logging.ERROR},
        environment={"NEW_ONE": "1", "TO_GO": None},
    )  # fmt: skip
    try:
        theirs.adopt(None, keep_folder=False)
        assert sys.path[0] == str(tmp_path / "src") and str(tmp_path / "absent") not in sys.path
        assert os.getcwd() == str(tmp_path / "src")
        assert torch.get_default_dtype() is torch.float64 and torch.get_float32_matmul_precision() == "high"
        assert logging.getLogger("of_a_test").level == logging.ERROR
        assert os.environ["NEW_ONE"] == "1" and "TO_GO" not in os.environ
        before.adopt(theirs, keep_folder=True)
        assert os.getcwd() == str(tmp_path / "src")
        assert torch.get_default_dtype() is before.dtype
        assert torch.get_float32_matmul_precision() == before.matmul_precision
        assert logging.getLogger("of_a_test").level == logging.NOTSET and "NEW_ONE" not in os.environ
    finally:
        before.adopt(theirs, keep_folder=False)


def test_variables_that_ray_has_not_seen(monkeypatch):
    monkeypatch.setattr(ray_private, "started_by_this_process", lambda: True)
    then = {"KEPT": "1", "GONE": "1", "OTHER": "1", "RAY_X": "1"}
    monkeypatch.setattr(inherited, "_start", inherited._Start("here", None, then, True))
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in {"KEPT": "1", "OTHER": "2", "NEW": "3", "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)
    assert inherited.changed_environment() == {"GONE": None, "NEW": "3", "OTHER": "2"}
    monkeypatch.setattr(ray_private, "started_by_this_process", lambda: False)
    assert inherited.changed_environment() == {}


def test_edited_modules_are_noticed(tmp_path, monkeypatch, caplog):
    path = tmp_path / "sibling_of_a_test.py"
    path.write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("sibling_of_a_test")
    modules = EditedModules()
    modules.note()
    assert str(path) in modules.stamps and not {torch.__file__, os.__file__} & modules.stamps.keys()
    assert not modules.outdated(shipped=False)
    path.write_text("value = 22\n")
    modules.note()  # a later run does not forget what the first one has imported
    assert modules.outdated(shipped=False)
    with caplog.at_level(logging.WARNING, "raytrainer"):
        assert not modules.outdated(shipped=True) and not modules.outdated(shipped=False)  # told once
    assert caplog.text.count("Workers have a copy") == 1
    path.unlink()
    assert not modules.outdated(shipped=False)
    del sys.modules["sibling_of_a_test"]


def test_modules_that_only_workers_have_imported(tmp_path, monkeypatch):
    path = tmp_path / "imported_late.py"
    path.write_text("value = 1\n")
    written = path.stat().st_mtime_ns
    monkeypatch.syspath_prepend(tmp_path)
    __import__("imported_late")
    imported = stamps(since=written + 1)
    late = stamps(since=written)  # it may have been edited after it was imported
    del sys.modules["imported_late"]
    modules = EditedModules()
    modules.note()
    assert str(path) not in modules.stamps
    modules.learn(imported)
    assert not modules.outdated(shipped=False)
    modules.learn(late)  # what is known from before counts
    assert not modules.outdated(shipped=False)
    path.write_text("value = 22\n")
    assert modules.outdated(shipped=False)
    fresh = EditedModules()
    fresh.learn(late)
    assert fresh.outdated(shipped=False)
