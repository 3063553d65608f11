"""Callbacks: `Callback` runs on the driver, `WorkerCallback` beside the module in every worker."""

from raytrainer.callbacks.backbone_finetuning import BackboneFinetuning
from raytrainer.callbacks.base_finetuning import BaseFinetuning
from raytrainer.callbacks.base_prediction_writer import BasePredictionWriter
from raytrainer.callbacks.callback import Callback, WorkerCallback
from raytrainer.callbacks.device_stats_monitor import DeviceStatsMonitor
from raytrainer.callbacks.early_stopping import EarlyStopping
from raytrainer.callbacks.ema_weight_averaging import EMAWeightAveraging
from raytrainer.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from raytrainer.callbacks.lambda_callback import LambdaCallback, LambdaWorkerCallback
from raytrainer.callbacks.learning_rate_monitor import LearningRateMonitor
from raytrainer.callbacks.model_checkpoint import ModelCheckpoint
from raytrainer.callbacks.model_summary import ModelSummary
from raytrainer.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from raytrainer.callbacks.prediction_writer import PredictionWriter
from raytrainer.callbacks.progress import ProgressBar
from raytrainer.callbacks.ray_tune import TuneReportCallback, tune_resources
from raytrainer.callbacks.rich_model_summary import RichModelSummary
from raytrainer.callbacks.spike_detection import SpikeDetection
from raytrainer.callbacks.stochastic_weight_averaging import StochasticWeightAveraging
from raytrainer.callbacks.throughput_monitor import ThroughputMonitor
from raytrainer.callbacks.timer import Timer
from raytrainer.callbacks.tuners import BatchSizeFinder, LearningRateFinder, Tuner
from raytrainer.callbacks.weight_averaging import WeightAveraging

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LambdaWorkerCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "PredictionWriter",
    "ProgressBar",
    "RichModelSummary",
    "SpikeDetection",
    "StochasticWeightAveraging",
    "ThroughputMonitor",
    "Timer",
    "TuneReportCallback",
    "Tuner",
    "WeightAveraging",
    "WorkerCallback",
    "tune_resources",
]
