"""Callbacks: `Callback` runs on the driver, `WorkerCallback` beside the module in every worker."""

from raytrainer.callbacks.callback import Callback, WorkerCallback
from raytrainer.callbacks.device_stats_monitor import DeviceStatsMonitor
from raytrainer.callbacks.early_stopping import EarlyStopping
from raytrainer.callbacks.learning_rate_monitor import LearningRateMonitor
from raytrainer.callbacks.model_checkpoint import ModelCheckpoint
from raytrainer.callbacks.model_summary import ModelSummary
from raytrainer.callbacks.progress import ProgressBar
from raytrainer.callbacks.tuning import BatchSizeFinder, LearningRateFinder, Tuner

__all__ = [
    "BatchSizeFinder",
    "Callback",
    "DeviceStatsMonitor",
    "EarlyStopping",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "ProgressBar",
    "Tuner",
    "WorkerCallback",
]
