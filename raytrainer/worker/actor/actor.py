"""What runs inside a worker's Ray actor: the same `Worker`, its errors made fit to travel."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle

from raytrainer.quick_imports import importing

with importing(alone=True):  # in a worker, nearly all of its imports
    import torch

    from raytrainer.data.by_value import start_all_by_value
    from raytrainer.errors import SerializationError
    from raytrainer.gpu.choice import use_pci_order
    from raytrainer.place_in_run import take_place
    from raytrainer.plan.errors_of_others import says_loader_died
    from raytrainer.plan.ranks import Ranks
    from raytrainer.private.ray_private import asked_to_end, log_folder
    from raytrainer.tensor_packing import pack, unpack, without_tensors
    from raytrainer.tracebacks import fold
    from raytrainer.worker.actor.kept_records import KeepsRecords
    from raytrainer.worker.actor.module_pickling import Pickled, dumps
    from raytrainer.worker.actor.output import Output
    from raytrainer.worker.actor.own_modules import Stamp, stamps
    from raytrainer.worker.actor.pieces_apart import apart
    from raytrainer.worker.actor.place import Place, own_versions
    from raytrainer.worker.actor.process_share import ProcessShare
    from raytrainer.worker.actor.stack_dump import can_be_asked
    from raytrainer.worker.process_group import ProcessGroup, make_store
    from raytrainer.worker.process_memory import keep_heap
    from raytrainer.worker.staging import arrived
    from raytrainer.worker.verbs import verb_of
    from raytrainer.worker.worker import Worker

__all__ = ["Failure", "RemoteWorker", "refuse_unpicklable"]


@dataclass(frozen=True)
class Failure:
    """An exception in a worker. `pickled` holds the exception itself, where it can be pickled."""

    rank: int
    node: str
    type_name: str
    message: str
    traceback: str
    pickled: bytes | None


class RemoteWorker(KeepsRecords):
    """An actor's body. Every method returns a `Failure` instead of raising."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.node, self.ranks = "?", Ranks()
        self.task: Any = None
        self.store: Any = None
        self.device = torch.device("cpu")
        self.output = Output()
        self.stacks = can_be_asked(log_folder() / "raytrainer")
        self.share: ProcessShare | None = None  # once it has been asked for, or taken over
        self.loaded = time.time_ns()  # when the latest task came
        self.settled = False  # whether what a first run has imported is set aside too
        keep_heap()
        start_all_by_value()
        gc.freeze()  # what is there by now is no garbage, and need not be looked through for that of runs

    def where(self, on_gpu: bool) -> Place:
        """This worker's place."""
        self.node = ray.util.get_node_ip_address()
        if on_gpu:
            use_pci_order()
        share = self.share = self.share or ProcessShare.of_this_process(on_gpu)
        node_id, host = ray.get_runtime_context().get_node_id(), socket.gethostname()
        return Place(node_id, self.node, host, share.gpus, own_versions(), os.getpid(), self.stacks, share)

    def take_over(self, share: ProcessShare, pid: int) -> Failure | None:
        """Have what Ray had given to the process `pid` of this node, which is gone."""

        def take_over() -> None:
            share.take_over(pid)
            self.share = share

        return self._guard(take_over)  # type: ignore[no-any-return]

    def imported(self) -> list[str]:
        """Names of the modules that this process has imported, in that order."""
        return list(sys.modules)

    def serve(self, host: str, world_size: int) -> Failure | int:
        """Serve the rendezvous store; return its port."""

        def serve() -> int:
            self.store, port = make_store(host, world_size)
            return port

        answer: Failure | int = self._guard(serve)
        return answer

    def join(self, ranks: Ranks, host: str, port: int, own_address: str, on_gpu: bool) -> Failure | None:
        """Take a rank and join the process group, leaving one joined before."""
        return self._guard(lambda: self._join(ranks, host, port, own_address, on_gpu))  # type: ignore[no-any-return]

    def _join(self, ranks: Ranks, host: str, port: int, own_address: str, on_gpu: bool) -> None:
        self.ranks = ranks
        take_place(ranks)
        with contextlib.suppress(OSError, AttributeError):  # only root may; on clusters that somebody else started
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        self._leave()
        if on_gpu:
            # Ray shows each worker its own GPU only
            self.device = torch.device("cuda", 0)
            torch.cuda.set_device(self.device)
        self.worker = Worker(ranks, self.device)
        if ranks.world_size > 1:
            backend = "nccl" if on_gpu else "gloo"
            store = self.store if ranks.rank == 0 else None  # it may have one of a group whose rank 0 it was
            self.worker.group = ProcessGroup(ranks, host, port, own_address, backend, self.device, store)

    def leave(self) -> Failure | None:
        """Leave the run and the process group, whose other workers may be gone; the process goes on."""
        return self._guard(self._leave)  # type: ignore[no-any-return]

    def _leave(self) -> None:
        if self.worker is not None:
            self.records = self.worker.records
            self.worker.abandon()
            if self.worker.group is not None:
                self.worker.group.close()
            self.worker = self.task = None
            gc.collect()  # DDP's cycles, which hold the old group

    def load(self, pickled: Pickled, datasets: dict[str, Any], show: bool) -> Failure | str | None:
        """Unpickle a task; it stays here until `setup`. Ray has unpickled its datasets.

        Returns:
            The file that this worker's prints go to unless they are to be shown.
        """

        def load() -> str | None:
            self.loaded, self.records = time.time_ns(), None
            self.output.announce(self.ranks.rank)
            path = None if show or self.ranks.rank == 0 else self.output.keep(self.ranks.rank)
            try:
                self.task = pickled.get()
            except ModuleNotFoundError as error:
                error.add_note(
                    f"A worker on {self.node} could not import it. Put it beside the script, install it on the nodes "
                    f"or name it: Trainer(runtime_env={{'py_modules': [...]}})."
                )
                raise
            self.task.datasets = datasets
            return path

        return self._guard(load)  # type: ignore[no-any-return]

    def obey(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Obey the verb of this name."""

        def obey() -> Any:
            method: Callable[..., Any] = getattr(Worker, name)
            declared = verb_of(method)
            given: tuple[Any, ...] = tuple(unpack(value) for value in args) if declared.shares else args
            if declared.takes_task:
                given = (self.task,)
            answer = self._worker().obey(method, *given, **kwargs)
            return Pickled(dumps(answer)) if isinstance(answer, torch.nn.Module) else answer

        return self._guard(obey)

    def obey_packed(self, packed: bytes) -> Any:
        """The same of verbs that have been pickled, once for all workers: their names, args and kwargs.

        Returns:
            The last one's answer, or the first failure.
        """
        answer = None
        for name, args, kwargs in pickle.loads(packed):
            answer = self.obey(name, *args, **kwargs)
            if isinstance(answer, Failure):
                break
        return answer

    def rest(self) -> Any:
        """The run is over, and there is none for now; the user's modules that it has imported."""
        return self._guard(self._rest)

    def _rest(self) -> dict[str, Stamp]:
        self.task = None
        self._worker().rest()
        if not self.settled:
            self.settled = True
            gc.freeze()  # what the first run has imported, mostly
        return stamps(self.loaded)

    @ray.method(num_returns=3)
    def capture(self, weights_only: bool, final: bool = False) -> tuple[Any, Any, Any]:
        """This worker's share of a checkpoint, which Ray copies into shared memory as this returns.

        In three parts: what this worker alone has, which is small and so travels to the driver at once; what others
        have too; and its pieces of tensors, see `apart`.
        """

        def capture() -> tuple[Any, Any, Any]:
            state = arrived(self._worker().capture(weights_only, replica=True, live=True, final=final))
            refuse_unpicklable(state)
            return pack(state.get("own")), *apart(state)

        answer = self._guard(capture)
        return (answer, answer, answer) if isinstance(answer, Failure) else answer

    def _worker(self) -> Worker:
        assert self.worker is not None
        return self.worker

    def _guard(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except BaseException as error:
            if asked_to_end(error):
                raise
            pickled = None
            with contextlib.suppress(Exception):
                pickled = cloudpickle.dumps(error)
                pickle.loads(pickled)
            with contextlib.suppress(Exception):
                fold(error)
            text = "".join(traceback.format_exception(error))
            kept = f"; its output: {self.output.path}" if self.output.path else ""
            sys.stdout.flush()
            node = f"{self.node} (pid {os.getpid()}, {socket.gethostname()}{kept})"
            return Failure(self.ranks.rank, node, type(error).__name__, str(error), text, pickled)


def refuse_unpicklable(state: dict[str, Any]) -> None:
    """Say now what Ray would say when the state is already on its way.

    Raises:
        SerializationError: Names the entry.
    """
    for name, value in state.items():
        try:
            # the callback keeps the bytes of arrays out of it, which would only be copied
            cloudpickle.dumps(without_tensors(value), protocol=5, buffer_callback=lambda buffer: None)
        except Exception as error:
            if says_loader_died(error):
                raise
            raise SerializationError(
                f"checkpoint[{name!r}] cannot be pickled: {type(error).__name__}: {error}. Leave it out in "
                f"on_save_checkpoint, or in the state_dict() that it comes from."
            ) from None
