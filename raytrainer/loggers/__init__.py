"""Loggers: where metrics and hyperparameters go. They live on the driver."""

from raytrainer.loggers.csv_logger import CSVLogger
from raytrainer.loggers.logger import Logger
from raytrainer.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger"]
