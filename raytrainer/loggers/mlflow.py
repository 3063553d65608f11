"""Metrics, hyperparameters and pictures for an MLflow server, database or folder."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from raytrainer.extras import not_installed
from raytrainer.loggers.logger import Logger, displayable, flatten
from raytrainer.loggers.media import as_images, as_values

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["MLFlowLogger"]

log = logging.getLogger("raytrainer")

_AT_ONCE = 1000  # values that MLflow takes in one request
_PARAMS_AT_ONCE = 100
_LONGEST_PARAM = 6000
_STATUS = {"success": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class MLFlowLogger(Logger):
    """Gives everything to one run of MLflow, which is made when something is logged.

    A second `fit` goes on in the same run. Characters that MLflow refuses in names become "_".

    Args:
        experiment_name: The experiment; made if it is not there.
        run_name: What the run is called; None: MLflow invents a name.
        tracking_uri: A server, "sqlite:///file.db" (needs the whole of mlflow), or a folder; None: MLFLOW_TRACKING_URI,
            or what MLflow takes by default.
        tags: Tags of the run.
        run_id: Go on with this run.
        prefix: Put before every metric's name, with a "-".

    Raises:
        ConfigurationError: MLflow is not installed.
    """

    def __init__(
        self,
        experiment_name: str = "raytrainer",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        prefix: str = "",
    ) -> None:
        _client_class()
        self._experiment_name, self._run_name = experiment_name, run_name
        self._tracking_uri, self._tags = tracking_uri, dict(tags or {})
        self._run_id = run_id
        self._prefix = f"{prefix}-" if prefix else ""
        self._client: MlflowClient | None = None
        self._running = False
        self._step = 0
        self._params: dict[str, str] = {}

    @property
    def experiment(self) -> MlflowClient:
        """The MlflowClient, for what else it can do; use it with `run_id`."""
        if self._client is None:
            self._client = _client_class()(tracking_uri=self._tracking_uri)
        return self._client

    @property
    def run_id(self) -> str:
        """MLflow's id of the run, which is made if there is none yet."""
        client = self.experiment
        if self._run_id is None:
            known = client.get_experiment_by_name(self._experiment_name)
            experiment = client.create_experiment(self._experiment_name) if known is None else known.experiment_id
            self._run_id = client.create_run(experiment, tags=self._tags, run_name=self._run_name).info.run_id
        elif not self._running:
            client.update_run(self._run_id, status="RUNNING")
        self._running = True
        return self._run_id

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self._experiment_name

    @property
    def version(self) -> str | None:
        """MLflow's id of the run; None before there is one."""
        return self._run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values."""
        self.log_rows([(self._step if step is None else step, metrics)])

    def log_rows(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Log many values in few requests."""
        from mlflow.entities import Metric

        now, values = int(time.time() * 1000), []
        for step, metrics in rows:
            self._step = step
            values += [Metric(_name(self._prefix + name), float(value), now, step) for name, value in metrics.items()]
        for start in range(0, len(values), _AT_ONCE):
            self.experiment.log_batch(self.run_id, metrics=values[start : start + _AT_ONCE])

    def log_hyperparams(self, params: Any) -> None:
        """Log hyperparameters, nested ones as "outer/inner". MLflow keeps the first value of each."""
        from mlflow.entities import Param

        given = {_name(name): str(displayable(value))[:_LONGEST_PARAM] for name, value in flatten(params).items()}
        changed = sorted(name for name, value in given.items() if self._params.get(name, value) != value)
        if changed:
            log.warning("MLflow cannot change the parameters %s of a run; they stay as they are.", ", ".join(changed))
        new = [Param(name, value) for name, value in given.items() if name not in self._params]
        for start in range(0, len(new), _PARAMS_AT_ONCE):
            self.experiment.log_batch(self.run_id, params=new[start : start + _PARAMS_AT_ONCE])
        self._params = given | self._params

    def log_image(self, key: str, images: Any, step: int | None = None, caption: Any = None) -> None:
        """Log pictures; several are "key/0", "key/1", ... MLflow shows no captions."""
        arrays = as_images(images)
        for index, array in enumerate(arrays):
            name = _name(key if len(arrays) == 1 else f"{key}/{index}")
            self.experiment.log_image(self.run_id, array, key=name, step=self._step if step is None else step)

    def log_histogram(self, key: str, values: Any, step: int | None = None) -> None:
        """Log a histogram as a JSON file "histograms/<key>-<step>.json" with "counts" and "edges"."""
        import numpy as np

        counts, edges = np.histogram(as_values(values), bins=64)
        content = {"counts": counts.tolist(), "edges": edges.tolist()}
        self.experiment.log_dict(self.run_id, content, self._file("histograms", key, step, "json"))

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        """Log a text as a file "texts/<key>-<step>.txt"."""
        self.experiment.log_text(self.run_id, text, self._file("texts", key, step, "txt"))

    def _file(self, folder: str, key: str, step: int | None, suffix: str) -> str:
        return f"{folder}/{_name(key)}-{self._step if step is None else step}.{suffix}"

    def finalize(self, status: str) -> None:
        """Say how the run ended; the next call goes on with it."""
        if self._running and self._run_id is not None:
            self.experiment.set_terminated(self._run_id, _STATUS.get(status, "FINISHED"))
            self._running = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}


def _client_class() -> Any:
    try:
        from mlflow.tracking import MlflowClient
    except ModuleNotFoundError as error:
        raise not_installed("MLFlowLogger", "mlflow-skinny (or mlflow)", "mlflow", "use CSVLogger") from error
    return MlflowClient


def _name(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)
