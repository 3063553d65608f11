from __future__ import annotations

import pickle
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrainer.errors import ConfigurationError
from raytrainer.loggers.tensorboard import TensorBoardLogger

pytest.importorskip("tensorboardX")


def events(folder: str) -> Iterator[Any]:
    """All events of a folder. A record is its length (8 bytes), a checksum (4), the message, a checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(Path(folder).glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def scalars(folder: str) -> list[tuple[str, int, float]]:
    found = [
        (value.tag, event.step, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]
    return sorted(found)


def hyperparameters(folder: str) -> dict[str, Any]:
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    found: dict[str, Any] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.tag == "_hparams_/session_start_info":
                content = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                for name, item in content.session_start_info.hparams.items():
                    found[name] = getattr(item, item.WhichOneof("kind"))
    return found


def test_scalars_over_two_fits_in_the_same_second(tmp_path):
    logger = TensorBoardLogger(tmp_path, prefix="run")
    logger.log_metrics({"loss": 0.5, "epoch": 0}, step=3)
    logger.finalize("success")
    logger.log_rows([(4, {"loss": 0.25}), (5, {"loss": 0.125})])
    logger.log_metrics({"acc": 1.0})
    logger.finalize("success")
    assert logger.log_dir == f"{tmp_path}/logs/version_0"
    assert scalars(logger.log_dir) == [
        ("run-acc", 5, 1.0),
        ("run-epoch", 3, 0.0),
        ("run-loss", 3, 0.5),
        ("run-loss", 4, 0.25),
        ("run-loss", 5, 0.125),
    ]


def test_hyperparameters(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    params = {"lr": 0.1, "net": {"depth": 3, "bias": True}, "name": "x", "layers": [1, 2], "none": None}
    logger.log_hyperparams(params)
    logger.log_hyperparams(params)  # a second fit says nothing new
    logger.save()
    logger.finalize("success")
    found = hyperparameters(logger.log_dir)
    assert found == {"lr": 0.1, "net/depth": 3.0, "net/bias": True, "name": "x", "layers": "[1, 2]", "none": "None"}
    assert scalars(logger.log_dir) == [("hp_metric", 0, -1.0)]


def test_no_default_metric(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    assert hyperparameters(logger.log_dir) == {"lr": 0.1} and scalars(logger.log_dir) == []


def test_nothing_is_made_before_it_is_needed(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []
    assert logger.experiment is logger.experiment
    logger.finalize("success")


def test_a_copy_opens_its_own_file(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    copy = pickle.loads(pickle.dumps(logger))
    copy.log_metrics({"a": 2.0}, 2)
    for each in (logger, copy):
        each.finalize("success")
    assert scalars(logger.log_dir) == [("a", 1, 1.0), ("a", 2, 2.0)]


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigurationError, match=r"raytrainer\[tensorboard\]"):
        TensorBoardLogger(tmp_path)


def test_tensorboard_reads_it(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"loss": 0.5}, 3)
    logger.finalize("success")
    reader = accumulator.EventAccumulator(logger.log_dir).Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [(3, 0.5)]
    assert "_hparams_/session_start_info" in reader.summary_metadata
