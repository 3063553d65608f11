"""What the driver sends to its workers: one task a run. Never the Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.datamodule import DataModule
from raytrainer.module import Module
from raytrainer.plan.settings import Settings
from raytrainer.profilers.profiler import Profiler

__all__ = ["Task"]


@dataclass
class Task:
    """One run, as a worker needs it."""

    stage: str  # "fit", "validate", "test", "predict"
    module: Module
    datamodule: DataModule | None
    settings: Settings
    callbacks: list[WorkerCallback]
    loaders: dict[str, Any] = field(default_factory=dict)  # handed straight to fit(...): by "train", "val", ...
    seed: int = 0  # of shuffling and loader processes; drawn by the driver where the user gave none
    reseed: bool = True  # whether workers seed their own generators from it
    counters: tuple[int, int] = (0, 0)  # steps and epochs of the last fit, for an evaluation
    resuming: bool = False  # whether a checkpoint is restored right after `setup`, before there are optimizers
    default_root_dir: str = "."
    log_dir: str | None = None  # None: the same
    ask_predictions: bool = True  # whether predictions are sent to the driver
    datasets: dict[str, list[Any]] = field(default_factory=dict)  # Ray Datasets made ready: by "train", "val", ...
    profiler: Profiler | None = None
    logs: bool | None = None  # `self.logger` in workers: True: calls go to the loggers, False: nowhere; None: no logger

    def __getstate__(self) -> dict[str, Any]:
        # datasets travel beside the task: Ray must see the references to blocks in them
        return {**self.__dict__, "datasets": {}}
