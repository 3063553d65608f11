from __future__ import annotations

import json
import pickle
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Tiny, data

from raytrainer import WandbLogger
from raytrainer.errors import ConfigurationError

wandb = pytest.importorskip("wandb")


@pytest.fixture
def offline(monkeypatch) -> Iterator[None]:
    """No network, no words; W&B's process is ended."""
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield
    wandb.teardown()


def records(folder: Path) -> Iterator[Any]:
    """All records of all offline runs in `folder`, W&B's process being ended: it may write a run's last ones then.

    A file is 7 bytes, then LevelDB's log format: blocks of 32 KiB, in which a piece is a checksum (4 bytes), a length
    (2), a kind (1: whole, 2: first, 3: middle, 4: last) and content.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()
    for path in sorted(folder.rglob("*.wandb")):
        content, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(content):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
            whole += content[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                yield Record.FromString(whole)
                whole = b""


def rows(folder: Path) -> list[dict[str, Any]]:
    found = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *outer, name = item.nested_key or [item.key]
                place = row
                for key in outer:
                    place = place.setdefault(key, {})
                place[name] = json.loads(item.value_json)
            found.append({name: value for name, value in row.items() if not name.startswith("_")})
    return found


def config(folder: Path) -> dict[str, Any]:
    found = {}
    for record in records(folder):
        updates = list(record.config.update) + list(record.run.config.update)
        found |= {item.key: json.loads(item.value_json) for item in updates if item.key}
    return found


def test_a_run_is_in_its_file(offline, tmp_path):
    logger = WandbLogger("project", "first", tmp_path, prefix="p")
    assert list(tmp_path.iterdir()) == [] and logger.version is None
    logger.log_hyperparams({"lr": 0.1, "net": {"width": 3}})
    logger.log_metrics({"loss": 0.5}, 3)
    logger.log_metrics({"loss": 0.25}, 2)  # W&B's own count cannot go back
    logger.log_image("i", np.zeros((2, 2, 3), dtype="uint8"), step=7, caption="black")
    logger.log_histogram("h", [1.0, 2.0, 2.0], step=8)
    logger.log_text("t", "hello", step=9)
    assert logger.name == "project" and logger.experiment.id == logger.version
    logger.finalize("success")
    found = rows(tmp_path)
    step = "trainer/global_step"
    assert found[:2] == [{"p-loss": 0.5, step: 3}, {"p-loss": 0.25, step: 2}]
    assert [row[step] for row in found[2:]] == [7, 8, 9]
    assert found[2]["p-i"]["captions"] == ["black"] and found[2]["p-i"]["count"] == 1
    assert sum(found[3]["p-h"]["values"]) == 3 and found[4]["p-t"]["nrows"] == 1
    assert config(tmp_path)["lr"] == 0.1 and config(tmp_path)["net"] == {"width": 3}


def test_in_two_fits_beside_another_logger(offline, local_trainer, tmp_path):
    from raytrainer import CSVLogger

    class Logging(Tiny):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("loss", loss)
            if batch_idx == 0:
                self.logger.log_histogram("weights", self.layer.weight)
            return loss

    logger, csv = WandbLogger("project", save_dir=tmp_path / "wb"), CSVLogger(tmp_path / "csv")
    trainer = local_trainer(max_epochs=1, logger=[logger, csv], log_every_n_steps=5)
    trainer.fit(Logging(), data())
    version = logger.version
    trainer.fit(Logging(), data())
    assert logger.version == version
    found = rows(tmp_path / "wb")
    assert [row["trainer/global_step"] for row in found if "loss" in row] == [4, 9, 4, 9]
    assert len([row for row in found if "weights" in row]) == 2
    assert len(csv.path.read_text().splitlines()) == 5


def test_an_active_run_is_used_and_left_open(offline, tmp_path):
    with wandb.init(dir=tmp_path, project="theirs") as run:
        logger = WandbLogger("ours", save_dir=tmp_path)
        logger.log_metrics({"a": 1.0}, 0)
        logger.finalize("success")
        assert wandb.run is run
        run.log({"b": 1})
    assert [sorted(row)[0] for row in rows(tmp_path)] == ["a", "b"]


def test_a_copy_goes_on_with_the_same_run(offline, tmp_path):
    logger = WandbLogger(save_dir=tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    copy = pickle.loads(pickle.dumps(logger))
    assert copy.version == logger.version is not None
    logger.finalize("success")


def test_wrong_arguments(monkeypatch):
    with pytest.raises(ConfigurationError, match="'sometimes'"):
        WandbLogger(mode="sometimes")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigurationError, match=r"extra 'wandb'"):
        WandbLogger()
