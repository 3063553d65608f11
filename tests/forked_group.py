"""Workers that are forked off the test's process: what several of them do together, without Ray and within a moment.

`ForkedGroup` is a `WorkerGroup` as `RayGroup` is one: the same verbs, sent over pipes. So a Trainer that is given one
(`forked`, in tests/strategies/conftest.py) goes through the whole of a run.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.driver.workers.local_group import local_group
from raytrainer.driver.workers.standstill_watch import StandstillWatch
from raytrainer.driver.workers.worker_group import Copies, Recorded, Room
from raytrainer.errors import DisagreementError, WorkerLostError
from raytrainer.messages import SetupReport
from raytrainer.plan.culprit import Failed, is_consequence
from raytrainer.plan.ranks import Ranks
from raytrainer.plan.recoveries import Continuity
from raytrainer.plan.where_it_is import Whereabouts, whereabouts
from raytrainer.task import Task
from raytrainer.tensor_packing import pack, unpack
from raytrainer.worker.actor.stack_dump import ask, can_be_asked, glance
from raytrainer.worker.process_group import ProcessGroup, make_store
from raytrainer.worker.verbs import verb_of
from raytrainer.worker.worker import Worker

#: Seconds that other workers have to answer when one has failed. One that has not is ended with the group.
PATIENCE = 0.5

# a fork of a process whose torch knows GPUs cannot run backward passes
FORK = multiprocessing.get_context("forkserver" if torch.cuda.device_count() else "fork")


class ForkedGroup:
    """Workers in processes of their own.

    Args:
        size: How many.
        nodes: How many nodes they believe to be on.
    """

    in_process = False
    continuity = Continuity()

    def __init__(self, size: int, nodes: int = 1) -> None:
        self.size, self.nodes, self.broken = size, nodes, False
        self._patience = 600.0  # the run's `hang_timeout`, of those that are stopped: others are slow, at worst
        self.by_node: Mapping[str, int] = {f"node{index}": size // nodes for index in range(nodes)}
        ports = FORK.Queue()
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = FORK.Pipe()
            process = FORK.Process(target=_work, args=(rank, size, nodes, ports, there, self._folder.name))
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self._stacks: list[str] = []
        self._stacks = self._answers()

    def describe(self) -> str:
        return f"{self.size} forked workers"

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def setup(self, task: Task) -> list[SetupReport]:
        self._patience = task.settings.hang_timeout
        sent = cloudpickle.dumps(task)
        reports: list[SetupReport] = self._tell("setup", sent)
        return reports

    def call(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        verb = verb_of(method)
        return self._tell(verb.name, cloudpickle.dumps((pack(args) if verb.shares else args, kwargs)))

    def later(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        self.call(method, *args, **kwargs)

    def room(self, weights_only: bool) -> Room:
        return Room()

    def capture(self, weights_only: bool = False, final: bool = False) -> Copies:
        parts = self._tell("capture", cloudpickle.dumps(((weights_only,), {"final": final})))

        return Copies(lambda: ([unpack(cloudpickle.loads(part)) for part in parts], None))

    def _tell(self, name: str, sent: bytes) -> list[Any]:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(cloudpickle.dumps((name, sent)))
        return self._answers()

    def _answers(self) -> list[Any]:
        """What all say, by rank; the first error of any of them, whoever else still waits."""
        answers: dict[int, Any] = {}
        began = time.monotonic()
        watch, until = StandstillWatch(self._asked_now), began + 120.0
        while len(answers) < self.size:
            left = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = multiprocessing.connection.wait(list(left), timeout=0.2)
            if not ready and time.monotonic() > until:
                raise TimeoutError(f"ranks {sorted(left.values())} have not answered")
            if not ready and time.monotonic() > began + self._patience:
                for rank in left.values():
                    if self._is_stopped(rank):
                        raise WorkerLostError(rank, f"no answer for {self._patience:.0f} s (hang_timeout)")
            if not ready and self._stacks:
                try:
                    watch.look(answers)
                except DisagreementError:
                    self.abort()
                    raise
            for pipe in ready:
                rank = left[pipe]  # type: ignore[index]
                try:
                    answer = cloudpickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    raise WorkerLostError(rank, "its process has ended") from None
                if isinstance(answer, tuple) and answer[:1] == ("error",):
                    error = answer[1]
                    error.add_note(f"rank {rank}: {answer[2]}")
                    self._tell_of_the_lost(rank, error)
                    del left[pipe]
                    self._end_if_waiting([one for one in left if left[one] not in answers])
                    raise error
                answers[rank] = answer
        return [answers[rank] for rank in range(self.size)]

    def _is_stopped(self, rank: int) -> bool:
        return Path(f"/proc/{self.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def _tell_of_the_lost(self, rank: int, error: BaseException) -> None:
        """Whose connection has broken hears of it before the end of the other's process is seen here."""
        failure = Failed(rank, "raised", type(error).__name__, str(error))
        if is_consequence(failure) and any(word in failure.message.lower() for word in ("connection", "broken pipe")):
            others = {process.sentinel: other for other, process in enumerate(self._processes) if other != rank}
            for gone in multiprocessing.connection.wait(list(others), timeout=60.0):
                raise WorkerLostError(others[gone], "its process has ended")  # type: ignore[index]

    def _end_if_waiting(self, pipes: list[Any]) -> None:
        """After an error, end workers that do not answer soon: they wait for the one that has failed."""
        until = time.monotonic() + PATIENCE
        while pipes and (ready := multiprocessing.connection.wait(pipes, max(0.0, until - time.monotonic()))):
            for pipe in ready:
                with contextlib.suppress(EOFError, OSError):
                    pipe.recv_bytes()  # type: ignore[union-attr]
                pipes.remove(pipe)
        if pipes:
            self.abort()

    def whereabouts(self, patience: float) -> list[Whereabouts]:
        asked = zip(self.pids, self._stacks, strict=True)
        return [whereabouts(rank, f"pid {pid}", ask(pid, stacks, patience)) for rank, (pid, stacks) in enumerate(asked)]

    def _asked_now(self) -> Callable[[], list[Whereabouts]]:
        asked = zip(self.pids, self._stacks, strict=True)
        found = [whereabouts(rank, f"pid {pid}", glance(pid, path, 5.0)) for rank, (pid, path) in enumerate(asked)]
        return lambda: found

    def call_off(self) -> None:
        self.abort()

    def mended(self) -> None:
        """All workers start anew."""

    def recorded(self, chunks: Collection[int]) -> Recorded | None:
        """Nothing that outlives them."""

    def keep_spares(self, count: int) -> None:
        """There are none."""

    def abort(self) -> None:
        self.broken = True
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def release(self) -> None:
        if not self.broken:
            self._tell("rest", cloudpickle.dumps(((), {})))


class ForkedGroups:
    """Groups by (workers, nodes), started when they are first asked for, and kept."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], ForkedGroup] = {}

    def take(self, workers: int, nodes: int = 1) -> ForkedGroup:
        key = workers, nodes
        if key not in self._groups or self._groups[key].broken:
            self._groups[key] = ForkedGroup(workers, nodes)
        return self._groups[key]

    def take_the_place_of_rays(self, set_attribute: Callable[[Any, str, Any], None]) -> None:
        """Trainers get their workers here from now on."""

        def take(supply: GroupSupply, settings: Any) -> Any:
            if settings.strategy == "local":
                return local_group(settings)
            return self.take(settings.world_size, settings.num_nodes)

        set_attribute(GroupSupply, "prepare", lambda supply, settings: None)  # no Ray is started
        set_attribute(GroupSupply, "take", take)
        set_attribute(GroupSupply, "give_back", lambda supply, group: group.release())

    def close(self) -> None:
        for group in self._groups.values():
            if not group.broken:
                group.abort()


def _work(rank: int, size: int, nodes: int, ports: Any, pipe: Any, folder: str) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    stacks = can_be_asked(Path(folder))
    gc.freeze()  # looking for garbage would copy all memory that is shared with the test's process
    torch.set_num_threads(1)
    multiprocessing.current_process().daemon = False  # which may have no processes, as loaders do
    per_node = size // nodes
    ranks = Ranks(rank, size, rank % per_node, per_node, rank // per_node, nodes)
    worker = Worker(ranks, torch.device("cpu"))
    store = None
    if size > 1:
        if rank == 0:
            store, port = make_store("127.0.0.1", size)
            for _ in range(size - 1):
                ports.put(port)
        else:
            port = ports.get()
        worker.group = ProcessGroup(ranks, "127.0.0.1", port, "127.0.0.1", "gloo", worker.device, store)
    pipe.send_bytes(cloudpickle.dumps(stacks))
    while True:
        try:
            name, sent = cloudpickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            answer = _obey(worker, name, cloudpickle.loads(sent))
        except BaseException as error:
            try:
                cloudpickle.loads(cloudpickle.dumps(error))
            except Exception:
                error = RuntimeError(f"{type(error).__name__}: {error}")
            answer = ("error", error, "".join(traceback.format_exception(error)))
        pipe.send_bytes(cloudpickle.dumps(answer))


def _obey(worker: Worker, name: str, given: Any) -> Any:
    if name == "setup":
        if worker.ranks.local_rank == 0:
            worker.prepare_data(given)
        return worker.obey(Worker.setup, given)
    if name == "moments":  # after a loss: which steps were recorded; and then one of them
        return "none" if worker.records is None else worker.records.moments()
    if name == "recorded":
        assert worker.records is not None
        return worker.records.state(given)
    args, kwargs = given
    if name == "capture":
        return cloudpickle.dumps(pack(worker.capture(*args, **kwargs, replica=True)))
    if name == "rest":
        return worker.rest()
    method = getattr(Worker, name)
    return worker.obey(method, *(unpack(args) if verb_of(method).shares else args), **kwargs)
