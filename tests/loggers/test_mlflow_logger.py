from __future__ import annotations

import json
import logging
import pickle
import sys
from typing import Any

import numpy as np
import pytest
from tiny import Tiny, data

from raytrainer import MLFlowLogger
from raytrainer.errors import ConfigurationError

tracking: Any = None


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """By the one process that needs its 1,400 modules; before a test begins, as it sets an environment variable."""
    global tracking
    tracking = pytest.importorskip("mlflow.tracking")


@pytest.fixture
def uri(tmp_path, monkeypatch):
    """A file store: databases need more of mlflow than mlflow-skinny has."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return (tmp_path / "store").as_uri()


def test_a_run_is_in_the_store(uri, tmp_path):
    logger = MLFlowLogger("exp", "first", uri, tags={"kind": "test"}, prefix="p")
    assert not (tmp_path / "store").exists() and logger.version is None
    logger.log_hyperparams({"lr": 0.1, "net": {"width": 3}, "layer": Tiny})
    logger.log_rows([(3, {"loss": 0.5, "a:b": 1.0}), (4, {"loss": 0.25})])
    logger.log_metrics({"loss": 0.125})
    logger.log_image("picture", np.zeros((2, 2, 3), dtype="uint8"), step=7)
    logger.log_histogram("h", [1.0, 2.0, 2.0], step=2)
    logger.log_text("note", "hello")
    client = tracking.MlflowClient(uri)
    run = client.get_run(logger.run_id)
    assert run.info.status == "RUNNING" and run.info.run_name == "first" and run.data.tags["kind"] == "test"
    assert run.data.params["lr"] == "0.1" and run.data.params["net/width"] == "3" and "Tiny" in run.data.params["layer"]
    history = [(m.step, m.value) for m in client.get_metric_history(logger.run_id, "p-loss")]
    assert sorted(history) == [(3, 0.5), (4, 0.125), (4, 0.25)]
    assert client.get_metric_history(logger.run_id, "p-a_b")[0].value == 1.0
    logger.finalize("failed")
    assert client.get_run(logger.run_id and logger.version).data.tags["kind"] == "test"
    root = next((tmp_path / "store").rglob("artifacts"))
    assert sum(json.loads((root / "histograms/h-2.json").read_text())["counts"]) == 3
    assert (root / "texts/note-4.txt").read_text() == "hello"
    assert any("step+7" in path.name or "step%7" in path.name for path in (root / "images").iterdir())


@pytest.mark.parametrize(
    ("status", "shown"), [("success", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED")]
)
def test_how_it_ended(uri, status, shown):
    logger = MLFlowLogger(tracking_uri=uri)
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize(status)
    client = tracking.MlflowClient(uri)
    assert client.get_run(logger.version).info.status == shown
    logger.log_metrics({"a": 2.0}, 1)
    assert client.get_run(logger.version).info.status == "RUNNING"
    assert len(client.get_metric_history(logger.version, "a")) == 2


def test_changed_hyperparameters_stay(uri, caplog):
    logger = MLFlowLogger(tracking_uri=uri)
    root = logging.getLogger("raytrainer")
    root.addHandler(caplog.handler)
    try:
        for lr in (0.1, 0.1, 0.2):
            logger.log_hyperparams({"lr": lr})
    finally:
        root.removeHandler(caplog.handler)
    assert tracking.MlflowClient(uri).get_run(logger.run_id).data.params == {"lr": "0.1"}
    assert caplog.text.count("cannot change the parameters lr") == 1


def test_in_a_fit_beside_another(uri, local_trainer, tmp_path):
    from raytrainer import CSVLogger

    class Logging(Tiny):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("loss", loss)
            self.logger.log_histogram("weights", self.layer.weight)
            return loss

    module = Logging()
    module.save_hyperparameters({"width": 5})
    logger = MLFlowLogger(tracking_uri=uri)
    csv = CSVLogger(tmp_path / "csv")
    local_trainer(max_epochs=1, logger=[logger, csv], log_every_n_steps=1).fit(module, data())
    client = tracking.MlflowClient(uri)
    run = client.get_run(logger.version)
    assert run.info.status == "FINISHED" and run.data.params == {"width": "5"}
    assert [m.step for m in client.get_metric_history(logger.version, "loss")] == list(range(10))
    assert len(csv.path.read_text().splitlines()) == 11
    assert len(list((tmp_path / "store").rglob("histograms/*.json"))) == 10


def test_a_copy_goes_on_with_the_same_run(uri):
    logger = MLFlowLogger(tracking_uri=uri)
    logger.log_metrics({"a": 1.0}, 0)
    copy = pickle.loads(pickle.dumps(logger))
    copy.log_metrics({"a": 1.0}, 1)
    assert copy.version == logger.version


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(ConfigurationError, match=r"extra 'mlflow'"):
        MLFlowLogger()
