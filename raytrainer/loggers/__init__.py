"""Loggers: where metrics and hyperparameters go. They live on the driver."""

from raytrainer.loggers.csv_logger import CSVLogger
from raytrainer.loggers.logger import Logger
from raytrainer.loggers.mlflow import MLFlowLogger
from raytrainer.loggers.tensorboard import TensorBoardLogger
from raytrainer.loggers.wandb import WandbLogger

__all__ = ["CSVLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]
