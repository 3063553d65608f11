"""What an actor of Ray Data's does in lazy prediction, in this process."""

from __future__ import annotations

import numpy as np
import pytest
import ray.data.block  # here, since it sets environment variables, which no test may do
import torch
from tiny import Tiny

from raytrainer import RayDataset
from raytrainer.plan.settings import build_settings
from raytrainer.profilers import SimpleProfiler
from raytrainer.task import Task
from raytrainer.worker.actor.module_pickling import Pickled, dumps
from raytrainer.worker.actor.predictor import Predictor

pa = pytest.importorskip("pyarrow")


class Telling(Tiny):
    def predict_step(self, batch, batch_idx):
        if self.logger is not None:
            self.logger.log_text("t", "x")
        return self(batch["x"])


@pytest.mark.parametrize("logs", [None, False, True])
def test_nothing_is_logged_or_profiled(logs, monkeypatch):
    class Watched(SimpleProfiler):
        started = False

        def start(self, rank, device):
            self.started = True

    profiler, module = Watched(), Telling()
    task = Task("predict", module, None, build_settings(strategy="local"), [], logs=logs, profiler=profiler)
    monkeypatch.setattr("raytrainer.data.ray.ray_dataset._is_ray_dataset", lambda value: True)
    predictor = Predictor((Pickled(dumps(task)), None), RayDataset(None), False)
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    table = predictor(ray.data.block.BlockAccessor.batch_to_block({"x": x}))
    expected = module(torch.from_numpy(x)).detach().numpy()
    found = np.stack(table.column("prediction").to_pylist())
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (predictor.run.module.logger is None) == (logs is None)
    assert predictor.run.recorder.take() == []
    assert predictor.run.profiler is None and not profiler.started
