from __future__ import annotations

import argparse
import csv
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from raytrainer.errors import ConfigurationError
from raytrainer.loggers import csv_logger
from raytrainer.loggers.csv_logger import CSVLogger
from raytrainer.loggers.logger import Logger, flatten, next_version


def read(logger: CSVLogger) -> list[dict[str, str]]:
    with logger.path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_and_late_columns(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"epoch": 0, "loss": 0.5}, step=1)
    logger.save()
    logger.log_rows([(2, {"epoch": 0, "loss": 0.25}), (2, {"epoch": 0, "val, acc": torch.tensor(0.5)})])
    logger.log_metrics({"lr": float("nan")})
    logger.save()
    assert read(logger) == [
        {"epoch": "0", "step": "1", "loss": "0.5", "val, acc": "", "lr": ""},
        {"epoch": "0", "step": "2", "loss": "0.25", "val, acc": "", "lr": ""},
        {"epoch": "0", "step": "2", "loss": "", "val, acc": "0.5", "lr": ""},
        {"epoch": "", "step": "2", "loss": "", "val, acc": "", "lr": "nan"},
    ]
    assert logger.path == tmp_path / "logs" / "version_0" / "metrics.csv"
    assert [path.name for path in logger.path.parent.iterdir()] == ["metrics.csv"]


def test_the_file_is_rewritten_for_a_new_column_only(tmp_path, monkeypatch):
    rewrites: list[list[str]] = []
    add_columns = csv_logger._add_columns
    monkeypatch.setattr(
        csv_logger, "_add_columns", lambda path, columns, n: (rewrites.append(columns), add_columns(path, columns, n))
    )
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    for step in range(20):
        logger.log_metrics({"loss": 1.0, **({"val": 2.0} if step % 5 == 4 else {})}, step)
    assert rewrites == [["epoch", "step", "loss", "val"]] and len(read(logger)) == 20


def test_flushing(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(csv_logger.time, "monotonic", lambda: now[0])
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=3)
    logger.log_rows([(1, {"a": 1.0}), (2, {"a": 1.0})])
    assert not logger.path.exists()
    logger.log_metrics({"a": 1.0}, 3)
    assert len(read(logger)) == 3
    logger.log_metrics({"a": 1.0}, 4)
    assert len(read(logger)) == 3
    now[0] = 11.0
    logger.log_metrics({"a": 1.0}, 5)
    assert len(read(logger)) == 5
    logger.log_metrics({"a": 1.0}, 6)
    logger.finalize("success")
    logger.log_metrics({"a": 1.0}, 7)  # a second fit
    logger.finalize("success")
    assert [row["step"] for row in read(logger)] == list("1234567")


@pytest.mark.parametrize("name", ["loss", "acc"])
def test_continues_a_file_whose_last_line_was_cut(tmp_path, name):
    first = CSVLogger(tmp_path, version="mine")
    first.log_metrics({"loss": 1.0}, 1)
    first.save()
    with first.path.open("ab") as file:
        file.write(b",2")
    second = CSVLogger(tmp_path, version="mine")
    second.log_metrics({name: 3.0}, 3)
    second.save()
    rows = read(second)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["loss"] == "1.0" and rows[2][name] == "3.0"
    lengths = {len(line.split(",")) for line in second.path.read_text().splitlines()}
    assert name == "loss" or lengths == {4}


def test_versions(tmp_path):
    first, second = CSVLogger(tmp_path, "x"), CSVLogger(tmp_path, "x")
    assert (first.name, first.version, first.root_dir) == ("x", 0, f"{tmp_path}/x")
    first.log_metrics({"a": 1.0}, 0)
    first.save()
    assert second.version == 1  # looked up now, not when it was made
    (tmp_path / "x" / "version_7").mkdir()
    (tmp_path / "x" / "version_old").mkdir()
    assert CSVLogger(tmp_path, "x").log_dir == f"{tmp_path}/x/version_8"
    assert CSVLogger(tmp_path, "", 3).log_dir == f"{tmp_path}/version_3"
    assert next_version(tmp_path / "absent") == 0


@dataclass
class Settings:
    depth: int = 3


def test_hyperparameters(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "net": Settings(), "path": Path("/x"), "none": None})
    logger.log_hyperparams(argparse.Namespace(lr=0.2, more=[1, 2]))
    written = json.loads((Path(logger.log_dir) / "hparams.json").read_text())
    assert written == {"lr": 0.2, "net": {"depth": 3}, "path": "/x", "none": None, "more": [1, 2]}
    with pytest.raises(ConfigurationError, match="int"):
        logger.log_hyperparams(3)


def test_flatten():
    nested = {"a": {"b": 1, "c": Settings()}, "d": argparse.Namespace(e={}), 2: [1]}
    assert flatten(nested) == {"a/b": 1, "a/c/depth": 3, "d/e": {}, "2": [1]}


def test_pickles_with_its_rows(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    copy = pickle.loads(pickle.dumps(logger))
    copy.save()
    assert len(read(copy)) == 1


@pytest.mark.parametrize("arguments", [{"save_dir": "s3://bucket/x"}, {"save_dir": ".", "flush_logs_every_n_steps": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ConfigurationError):
        CSVLogger(**arguments)


def test_base_class_logs_rows_one_by_one():
    class Memory(Logger):
        def __init__(self) -> None:
            self.seen: list[tuple[int | None, dict[str, float]]] = []

        def log_metrics(self, metrics, step=None):
            self.seen.append((step, dict(metrics)))

        def log_hyperparams(self, params):
            pass

    logger = Memory()
    logger.log_rows([(1, {"a": 1.0}), (2, {"b": 2.0})])
    logger.finalize("success")
    assert logger.seen == [(1, {"a": 1.0}), (2, {"b": 2.0})]
    assert (logger.name, logger.version, logger.root_dir, logger.log_dir) == (None, None, None, None)
