from __future__ import annotations

import math

import pytest

from raytrainer.plan.retention import Placement, best_path, fill_template, free_name, place, worst_path
from raytrainer.plan.uris import is_inside, join_path

NAN = math.nan


@pytest.mark.parametrize(
    ("kept", "score", "top_k", "mode", "expected"),
    [
        ({}, 1.0, 0, "min", Placement(False)),
        ({"a": 1.0}, 9.0, -1, "min", Placement(True)),
        ({}, 1.0, 1, "min", Placement(True)),
        ({}, NAN, 1, "min", Placement(True)),
        ({"a": 1.0}, 0.5, 1, "min", Placement(True, "a")),
        ({"a": 1.0}, 1.0, 1, "min", Placement(False)),
        ({"a": 1.0}, 2.0, 1, "min", Placement(False)),
        ({"a": 1.0}, 2.0, 1, "max", Placement(True, "a")),
        ({"a": 1.0, "b": 3.0, "c": 2.0}, 2.5, 3, "min", Placement(True, "b")),
        ({"a": 1.0, "b": 3.0, "c": 2.0}, 2.5, 3, "max", Placement(True, "a")),
        ({"a": 1.0, "b": 2.0}, NAN, 2, "min", Placement(False)),
        ({"a": 1.0, "b": NAN}, 9.0, 2, "min", Placement(True, "b")),
        ({"a": 1.0, "b": NAN}, -9.0, 2, "max", Placement(True, "b")),
    ],
)
def test_place(kept, score, top_k, mode, expected):
    assert place(kept, score, top_k, mode) == expected


def test_best_and_worst():
    kept = {"a": 2.0, "b": NAN, "c": 1.0, "d": 1.0}
    assert [best_path(kept, "min"), worst_path(kept, "min")] == ["c", "b"]
    assert [best_path(kept, "max"), worst_path(kept, "max")] == ["a", "b"]
    assert best_path({}, "min") is None and worst_path({}, "max") is None


@pytest.mark.parametrize(
    ("template", "insert", "expected"),
    [
        ("{epoch}-{step}", True, "epoch=3-step=40"),
        ("{epoch}-{val_loss:.2f}", True, "epoch=3-val_loss=0.31"),
        ("{epoch:03d}", True, "epoch=003"),
        ("{epoch}-{epoch_test:.1f}", True, "epoch=3-epoch_test=7.0"),
        ("{val/loss:.2f}", True, "val_loss=0.25"),
        ("e{epoch}-{val/loss:.2f}", False, "e3-0.25"),
        ("run/{epoch}", True, "run/epoch=3"),
        ("{val.acc:.1f}", True, "val.acc=0.5"),
        ("{epoch_test:d}", True, "epoch_test=7"),
        ("{missing:.1f}", True, "missing=0.0"),
        ("{missing:d}", True, "missing=0"),
        ("{nan:.1f}", True, "nan=nan"),
        ("best", True, "best"),
    ],
)
def test_template(template, insert, expected):
    values = {
        "epoch": 3,
        "step": 40,
        "val_loss": 0.314,
        "val/loss": 0.25,
        "epoch_test": 7.0,
        "val.acc": 0.5,
        "nan": NAN,
    }
    assert fill_template(template, values, insert) == expected


def test_free_name():
    assert free_name("a", ".ckpt", lambda name: False) == "a.ckpt"
    assert free_name("a", ".ckpt", {"a.ckpt", "a-v1.ckpt"}.__contains__) == "a-v2.ckpt"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("s3://bucket", "a"), "s3://bucket/a"),
        (("s3://bucket/x/", "a", "b"), "s3://bucket/x/a/b"),
        (("s3://", "bucket"), "s3://bucket"),
        (("file:///", "tmp"), "file:///tmp"),
        (("/", "tmp"), "/tmp"),
        (("/a/", "/b"), "/a/b"),
        (("", "b"), "b"),
    ],
)
def test_join_path(parts, expected):
    assert join_path(*parts) == expected


def test_is_inside():
    assert is_inside("/a/b/c.ckpt", "/a/b") and is_inside("s3://x/a", "s3://x/")
    assert not is_inside("/a/bc.ckpt", "/a/b") and not is_inside("/a/b", "/a/b")
