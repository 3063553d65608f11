"""What workers of another process send home besides metrics: calls of `self.logger`, and profiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_models import Net, loader

from raytrainer import Logger, PyTorchProfiler

pytestmark = pytest.mark.usefixtures("ray_session")


class Calls(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass

    def log_image(self, key, images, step=None, caption=None):
        self.calls.append((key, images, step, caption))

    def log_text(self, key, text, step=None):
        self.calls.append((key, text, step))


class Telling(Net):
    def training_step(self, batch, batch_idx):
        self.logger.log_text("rank", f"{self.global_rank} of {self.trainer.world_size}")
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.logger.log_image("weights", self.body[0].weight.expand(1, 8, 4), caption="w")

    def on_train_end(self):
        self.logger.log_text("end", "end")


def test_calls_of_rank_0_reach_the_driver(ray_trainer):
    logger, module = Calls(), Telling()
    ray_trainer(max_epochs=2, logger=logger).fit(module, loader(24, 4))
    assert [call[:1] + call[-2:] for call in logger.calls if call[0] == "weights"] == [
        ("weights", 2, "w"), ("weights", 5, "w")
    ]  # fmt: skip
    assert [call for call in logger.calls if call[0] == "rank"] == [("rank", "0 of 2", step) for step in range(6)]
    assert [call[0] for call in logger.calls] == ["rank"] * 3 + ["weights"] + ["rank"] * 3 + ["weights", "end"]
    assert torch.equal(logger.calls[-2][1][0], module.body[0].weight.detach())


def test_a_trace_of_each_worker(ray_trainer, tmp_path):
    trainer = ray_trainer(max_epochs=1, profiler=PyTorchProfiler(wait=1, warmup=1, active=2))
    trainer.fit(Net(), loader(40, 4))
    assert trainer.profiler.files == [f"{tmp_path}/profile/rank{rank}.json" for rank in range(2)]
    processes = set()
    for path in trainer.profiler.files:
        events = json.loads(Path(path).read_text())["traceEvents"]
        steps = [event for event in events if event.get("name") == "raytrainer/training_step"]
        assert len(steps) == 2
        processes.add(steps[0]["pid"])
    assert len(processes) == 2
    assert trainer.time_report.starting > 0 and trainer.time_report.computing > 0
