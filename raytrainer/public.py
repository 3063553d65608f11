"""What `raytrainer` exports, which its `__getattr__` imports when the first of these names is asked for."""

from __future__ import annotations

from raytrainer.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LambdaWorkerCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    PredictionWriter,
    ProgressBar,
    RichModelSummary,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TuneReportCallback,
    WeightAveraging,
    WorkerCallback,
    tune_resources,
)
from raytrainer.checkpointing.checkpoint_export import export_weights
from raytrainer.data.combined_loader import CombinedLoader
from raytrainer.data.ray.ray_dataset import RayDataset
from raytrainer.datamodule import DataModule
from raytrainer.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    DisagreementError,
    MetricError,
    RaytrainerError,
    ResourceError,
    SerializationError,
    TrainingSpikeError,
    UnknownArgumentError,
    WorkerError,
    WorkerLostError,
)
from raytrainer.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from raytrainer.module import Module
from raytrainer.place_in_run import data_part, rank, world_size
from raytrainer.plan.given_arguments import constructor_answers
from raytrainer.plan.sharding_settings import FSDP, ModelParallel
from raytrainer.plan.strategy_settings import DDP, DDP2, DP
from raytrainer.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from raytrainer.seeding import seed_everything
from raytrainer.strategies.meta_modules import on_meta
from raytrainer.trainer import Trainer
from raytrainer.version import __version__

__all__ = [
    "DDP",
    "DDP2",
    "DP",
    "FSDP",
    "AdvancedProfiler",
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "CSVLogger",
    "Callback",
    "CheckpointError",
    "CombinedLoader",
    "ConfigurationError",
    "DataError",
    "DataModule",
    "DeviceStatsMonitor",
    "DisagreementError",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LambdaWorkerCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "Logger",
    "MLFlowLogger",
    "MetricError",
    "ModelCheckpoint",
    "ModelParallel",
    "ModelSummary",
    "Module",
    "OnExceptionCheckpoint",
    "PredictionWriter",
    "Profiler",
    "ProgressBar",
    "PyTorchProfiler",
    "RayDataset",
    "RaytrainerError",
    "ResourceError",
    "RichModelSummary",
    "SerializationError",
    "SimpleProfiler",
    "SpikeDetection",
    "StochasticWeightAveraging",
    "TensorBoardLogger",
    "ThroughputMonitor",
    "Timer",
    "Trainer",
    "TrainingSpikeError",
    "TuneReportCallback",
    "UnknownArgumentError",
    "WandbLogger",
    "WeightAveraging",
    "WorkerCallback",
    "WorkerError",
    "WorkerLostError",
    "__version__",
    "data_part",
    "export_weights",
    "on_meta",
    "rank",
    "seed_everything",
    "tune_resources",
    "world_size",
]

for _name in __all__:
    _exported = globals()[_name]
    if isinstance(_exported, type) and _exported is not Trainer and not issubclass(_exported, BaseException):
        constructor_answers(_exported)
