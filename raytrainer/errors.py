"""Everything that raytrainer raises on its own account.

    RaytrainerError
    ├── ConfigurationError (ValueError)   an argument or a hook's answer that cannot work; raised before training
    │   └── UnknownArgumentError (TypeError)    an argument of a name that there is not
    ├── DataError                         a loader that cannot feed the run
    ├── MetricError                       a `self.log` call that cannot be honoured
    ├── SerializationError                something that must reach the workers cannot be pickled; names it
    ├── CheckpointError                   a checkpoint that is missing, truncated, foreign or too new
    ├── DisagreementError                 workers that were to do, or to hold, the same have not
    ├── ResourceError                     the cluster cannot give what was asked
    ├── TrainingSpikeError (RuntimeError)    a loss that has jumped, where `SpikeDetection` looks at it
    ├── WorkerError                       user code failed in a worker: carries rank, node and its traceback
    └── WorkerLostError                   a worker process or its node is gone

An exception that user code raises keeps its own type: in the driver's process it is that exception, from a worker it
is a copy whose `__cause__` is the `WorkerError` that tells where it happened.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "DisagreementError",
    "MetricError",
    "RaytrainerError",
    "ResourceError",
    "SerializationError",
    "TrainingSpikeError",
    "UnknownArgumentError",
    "WorkerError",
    "WorkerLostError",
]


class RaytrainerError(Exception):
    """Base class of all errors that raytrainer itself raises."""


class ConfigurationError(RaytrainerError, ValueError):
    """An argument, or what a hook returned, cannot work. Says what was received, what is allowed, what to do."""


class UnknownArgumentError(ConfigurationError, TypeError):
    """An argument of a name that there is not. Says what was probably meant, or what stands for it here."""


class DataError(RaytrainerError):
    """A data loader cannot feed the run: empty on some rank, of the wrong type, or ended before its length."""


class MetricError(RaytrainerError):
    """A `self.log` call that cannot be honoured, or workers that logged different names."""


class DisagreementError(RaytrainerError):
    """Workers that were to do the same, or to hold the same, have not: names the ranks and what differs."""


class TrainingSpikeError(RaytrainerError, RuntimeError):
    """The loss has jumped, as `SpikeDetection` has seen. `batch_idx`: in which batch of the epoch."""

    def __init__(self, message: str, batch_idx: int) -> None:
        super().__init__(message)
        self.batch_idx = batch_idx

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.batch_idx)


class SerializationError(RaytrainerError):
    """An object that must be sent to the workers cannot be pickled."""


class CheckpointError(RaytrainerError):
    """A checkpoint is missing, truncated, not one of ours, from a newer version, or does not fit the module."""


class StateLostError(CheckpointError):
    """A state is gone with its workers before it could be written. `superseded`: by now these have been given up."""

    def __init__(self, message: str, superseded: Callable[[], bool]) -> None:
        super().__init__(message)
        self.superseded = superseded


class StorageError(CheckpointError):
    """A checkpoint, or a file of predictions, could not be written or deleted, for reasons of its filesystem."""


class GivenUpError(CheckpointError):
    """A checkpoint has not been written to its end, since there was no time for it."""


class ResourceError(RaytrainerError):
    """The cluster cannot give what was asked for, now or within the time to wait."""


class WorkerError(RaytrainerError):
    """User code failed in a worker.

    Attributes:
        rank: Global rank of the worker.
        node: Address of the worker's node.
        traceback: The worker's own traceback, as text.
    """

    def __init__(self, rank: int, node: str, traceback: str) -> None:
        super().__init__(rank, node, traceback)
        self.rank, self.node, self.traceback = rank, node, traceback

    def __str__(self) -> str:
        return f"worker of rank {self.rank} on {self.node} failed:\n\n{self.traceback}"


class WorkerLostError(RaytrainerError):
    """A worker's process ended, or its node can no longer be reached.

    Attributes:
        rank: Global rank of the lost worker.
        reason: What Ray says about it.
        could_start: Whether its process could; where it could not, another one hardly will.
        unreachable: Whether all that is known is that workers cannot reach each other: it may be well.
    """

    def __init__(self, rank: int, reason: str, could_start: bool = True, unreachable: bool = False) -> None:
        super().__init__(rank, reason, could_start, unreachable)
        self.rank, self.reason, self.could_start, self.unreachable = rank, reason, could_start, unreachable

    def __str__(self) -> str:
        return f"the worker of rank {self.rank} is gone: {self.reason}"
