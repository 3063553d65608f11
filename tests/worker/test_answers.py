"""Answers of workers are compared with what their verbs declare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy
import pytest

from raytrainer.errors import RaytrainerError
from raytrainer.messages import EvaluationReport, PlateauWish, SetupReport, TrainReport, TrainStart
from raytrainer.metric_messages import MetricReport, MetricSpec, Partial, StepRow
from raytrainer.worker.answers import understood
from raytrainer.worker.worker import Worker

SPEC = MetricSpec("loss", True, True, False, True, True, "mean")
METRICS = MetricReport(
    {"loss": SPEC}, [StepRow(0, 0, {"loss_step": 1})], {"loss": 0.5}, {"loss": Partial(1.0, numpy.float32(2))}
)
TRAINED = TrainReport(2, 4, 3, 0.5, False, False, 0.1, METRICS)


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        (Worker.setup, SetupReport(0)),
        (Worker.train, TRAINED),
        (Worker.train, replace(TRAINED, stop=numpy.bool_(True), batches=numpy.int64(2))),
        (Worker.start_training, TrainStart(None, 4, [None, 3])),
        (Worker.evaluate, EvaluationReport("test", 1, 0.1, True, METRICS, [(0, 0, object())])),
        (Worker.cursor, None),
        (Worker.cursor, (0, 1, 2, None)),
        (Worker.cursor, (0, 1, 2, "validate")),
        (Worker.compute_metrics, {"loss": 1}),
        (Worker.end_fit, None),
        (Worker.fetch_module, object()),
    ],
)
def test_what_is_declared_is_understood(method: Any, answer: Any) -> None:
    understood(method, [answer, answer])


@pytest.mark.parametrize(
    ("method", "answer", "said"),
    [
        (Worker.train, None, "None.* is no TrainReport"),
        (Worker.train, replace(TRAINED, step="3"), r"TrainReport.step = '3' is no int"),
        (Worker.train, replace(TRAINED, batches=-1), "a count that is too small"),
        (Worker.setup, SetupReport(1, parts=0), "a count that is too small"),  # which batches are divided by
        (
            Worker.start_training,
            TrainStart(1, plateaus=(PlateauWish(0, "ReduceLROnPlateau", "loss", "step", 0, True),)),
            r"TrainStart.plateaus = .* is no tuple",
        ),
        (
            Worker.train,
            replace(TRAINED, metrics=replace(METRICS, rows=[StepRow(0, 0, {"loss_step": "x"})])),
            "TrainReport.metrics.rows",
        ),
        (Worker.train, replace(TRAINED, metrics=replace(METRICS, specs={})), "TrainReport.metrics has .* a name"),
        (Worker.cursor, (1,), r"is no tuple\[int, int, int, str \| None\]"),
        (Worker.compute_metrics, {"loss": None}, "is no dict"),
        (Worker.end_fit, 1, "is no None"),
    ],
)
def test_anything_else_is_told(method: Any, answer: Any, said: str) -> None:
    with pytest.raises(RaytrainerError, match=f"rank 1 has answered .*{said}"):
        understood(method, [_right(method), answer])


def _right(method: Any) -> Any:
    answers: dict[Any, Any] = {
        Worker.train: TRAINED, Worker.cursor: (0, 1, 2, None), Worker.compute_metrics: {}, Worker.setup: SetupReport(0),
        Worker.start_training: TrainStart(None),
    }  # fmt: skip
    return answers.get(method)
