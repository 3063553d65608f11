"""A PyTorch trainer on Ray actors: `Module`, `DataModule`, `Trainer`."""

from __future__ import annotations

import logging
import sys

from raytrainer.callbacks import (
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    WorkerCallback,
)
from raytrainer.data.dataset import RayDataset
from raytrainer.datamodule import DataModule
from raytrainer.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    MetricError,
    RaytrainerError,
    ResourceError,
    SerializationError,
    WorkerError,
    WorkerLostError,
)
from raytrainer.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from raytrainer.module import Module
from raytrainer.plan.strategies import DDP, DDP2, DP
from raytrainer.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from raytrainer.seeding import seed_everything
from raytrainer.trainer import Trainer
from raytrainer.version import __version__

__all__ = [
    "DDP",
    "DDP2",
    "DP",
    "AdvancedProfiler",
    "BatchSizeFinder",
    "CSVLogger",
    "Callback",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "DataModule",
    "DeviceStatsMonitor",
    "EarlyStopping",
    "LearningRateFinder",
    "LearningRateMonitor",
    "Logger",
    "MLFlowLogger",
    "MetricError",
    "ModelCheckpoint",
    "ModelSummary",
    "Module",
    "Profiler",
    "ProgressBar",
    "PyTorchProfiler",
    "RayDataset",
    "RaytrainerError",
    "ResourceError",
    "SerializationError",
    "SimpleProfiler",
    "TensorBoardLogger",
    "Trainer",
    "WandbLogger",
    "WorkerCallback",
    "WorkerError",
    "WorkerLostError",
    "__version__",
    "seed_everything",
]


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever sys.stderr is now, so that a live progress bar or a test can take its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[no-untyped-def]
        return sys.stderr


_log = logging.getLogger("raytrainer")
if not _log.handlers:
    _log.addHandler(_StderrHandler())
    _log.setLevel(logging.INFO)
    _log.propagate = False
