from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytrainer.metrics.metric_board import MetricTime
from raytrainer.plan.settings import Settings


class FakeTrainer:
    """What callbacks see of a trainer, with checkpoints that are names in a set."""

    def __init__(self, root: Path) -> None:
        self.state = SimpleNamespace(fn="fit", status="running")
        self.default_root_dir, self.log_dir = str(root), None
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.progress_bar_metrics: dict[str, float] = {}
        self.times: dict[str, MetricTime] = {}
        self.global_step = self.current_epoch = self.total_batches = 0
        self.epoch_ended = self.about_to_validate = False
        self.max_epochs: int | None = 9
        self.max_steps: int | None = None
        self.settings = Settings(accumulate_grad_batches=1)
        self.sanity_checking = self.should_stop = False
        self.fast_dev_run = 0
        self.num_training_batches: int | None = 10
        self.num_val_batches: list[int | None] = [2]
        self.num_test_batches: list[int | None] = [4]
        self.num_predict_batches: list[int | None] = [4]
        self.num_sanity_val_batches = [2]
        self.ckpt_path: str | None = None
        self.stored: dict[str, int] = {}  # path -> step at which it was written
        self.removed: list[str] = []
        self.on_save: Callable[[str], None] = lambda path: None

    def save_checkpoint(self, path: str, weights_only: bool = False) -> None:
        self.on_save(path)
        self.stored[path] = self.global_step

    def remove_checkpoint(self, path: str) -> None:
        del self.stored[path]
        self.removed.append(path)

    def checkpoint_exists(self, path: str) -> bool:
        return path in self.stored

    def log(self, stage: str = "train", **metrics: float) -> None:
        self.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        self.times.update({name: MetricTime(stage, self.total_batches) for name in metrics})

    def metric_time(self, name: str) -> MetricTime | None:
        return self.times.get(name)

    def chunk(self, callback: Any, steps: int, validates: bool = False) -> None:
        """Some steps of one batch each, of which the callback is told."""
        self.global_step += steps
        self.total_batches += steps
        self.about_to_validate = validates
        callback.on_train_chunk_end(self, None, SimpleNamespace(steps=steps))
        self.about_to_validate = False

    def validate(self, callback: Any, **metrics: float) -> None:
        self.total_batches += 1
        callback.on_validation_start(self, None)
        self.log("validate", **metrics)
        callback.on_validation_end(self, None)

    def epoch(self, callback: Any, train: dict[str, float] | None = None, val: dict[str, float] | None = None) -> None:
        """Ten steps, a validation if `val` is given, the epoch's end."""
        self.global_step += 10
        self.total_batches += 10
        self.epoch_ended = True
        if val is not None:
            self.validate(callback, **val)
        self.log(**(train or {}))
        callback.on_train_epoch_end(self, None)
        self.current_epoch += 1
        self.epoch_ended = False


@pytest.fixture
def trainer(tmp_path: Path) -> FakeTrainer:
    return FakeTrainer(tmp_path)
