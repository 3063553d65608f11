"""`WorkerGroup`: the one seam between driver and workers. A group obeys the verbs that `Worker` declares."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from raytrainer.checkpointing.pieces_elsewhere import PiecesElsewhere
from raytrainer.messages import SetupReport
from raytrainer.plan.recoveries import Continuity
from raytrainer.plan.where_it_is import Whereabouts
from raytrainer.task import Task
from raytrainer.worker.worker import Worker

__all__ = ["Copies", "Recorded", "Room", "WorkerGroup"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Copies:
    """The states of all workers, copied aside.

    Attributes:
        fetch: Gives them, by rank, at any later time; and pieces of tensors, which may stay where they are.
        complete: Whether they are where a worker's death does not reach them.
    """

    fetch: Callable[[], tuple[list[dict[str, Any]], PiecesElsewhere | None]]
    complete: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Recorded:
    """What all workers of a group that has lost some had recorded of the same moment.

    Attributes:
        chunk: Of training, in which it is.
        records: By rank, as `worker/step_records.py` makes them.
        tensors: What all had alike, by name.
    """

    chunk: int
    records: list[bytes]
    tensors: dict[str, Any]


@dataclass(frozen=True)
class Room:
    """Room for one more state.

    Attributes:
        free: Whether there is some.
        single: Whether a state can be had only in place of the one before.
    """

    free: bool = True
    single: bool = False


class WorkerGroup(Protocol):
    """Workers that obey the verbs of `Worker`, all at once."""

    @property
    def size(self) -> int:
        """Number of workers."""

    @property
    def in_process(self) -> bool:
        """Whether the worker uses the driver's own objects, and lives and dies with it."""

    @property
    def broken(self) -> bool:
        """Whether it is of no use any more: it has been aborted, or has lost workers."""

    @property
    def continuity(self) -> Continuity:
        """How many of the workers were there before it was mended."""

    @property
    def by_node(self) -> Mapping[str, int]:
        """Workers on each node of a cluster, by its id."""

    def describe(self) -> str:
        """Where the workers are, in a few words."""

    def setup(self, task: Task) -> list[SetupReport]:
        """`prepare_data` once a node, then `setup` on every worker; its reports, by rank."""

    def call(self, method: Callable[Concatenate[Worker, P], R], /, *args: P.args, **kwargs: P.kwargs) -> list[R]:
        """Every worker obeys a verb, such as `Worker.train`; the answers, by rank.

        Raises:
            Exception: What user code raised in a worker; its `__cause__` is a `WorkerError` saying where.
            WorkerLostError: A worker is gone, or has not answered within the verb's limit.
        """

    def later(self, method: Callable[Concatenate[Worker, P], None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Every worker obeys a verb, before anything else that it is told; it may be sent with that."""

    def whereabouts(self, patience: float) -> list[Whereabouts]:
        """Where each worker is now, by rank, asked from beside it: at most `patience` seconds, from any thread."""

    def capture(self, weights_only: bool = False, final: bool = False) -> Copies:
        """Have every worker copy its state aside.

        Args:
            weights_only: Leave out what only resuming needs.
            final: The fit is over: no hook is called, and what comes home anyway is left out.
        """

    def room(self, weights_only: bool) -> Room:
        """What there is for such a state beside those that are still held."""

    def call_off(self) -> None:
        """The run has failed with an error that is being told: end it, keeping workers that are well."""

    def abort(self) -> None:
        """End whatever runs, at once; the group cannot be used any more."""

    def mended(self) -> WorkerGroup | None:
        """After a loss: a group of the workers that are left, which keep their processes, and of others for those lost.

        This one ends. None: there can be no such group, and all workers are to start anew.
        """

    def recorded(self, chunks: Collection[int]) -> Recorded | None:
        """Of a group that is another one's, mended: what that had recorded last in one of these chunks."""

    def keep_spares(self, count: int) -> None:
        """From now on, let so many processes on each node wait to take a lost worker's place."""

    def release(self) -> None:
        """The run is over: give back what it held."""
