"""Checkpoints on the driver: what was captured, and a thread that writes it while training goes on."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raytrainer.checkpointing.checkpoint_format import write_checkpoint
from raytrainer.checkpointing.pieces import KEY
from raytrainer.checkpointing.places import checkpoint_exists, remove_checkpoint
from raytrainer.checkpointing.reservations import release
from raytrainer.driver.workers.worker_group import Copies
from raytrainer.errors import CheckpointError, GivenUpError, StateLostError, StorageError
from raytrainer.hparams import kept
from raytrainer.module import Module
from raytrainer.plan.steps_and_epochs import Progress
from raytrainer.signals import PIECE, hear, shield

__all__ = ["Captured", "CheckpointWriter", "idle_checkpoint"]

log = logging.getLogger("raytrainer")


def idle_checkpoint(module: Module, progress: Progress, rest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The state of a module that no workers have: the driver's own weights.

    Args:
        module: The module.
        progress: Where its fit ended.
        rest: What only resuming needs; None: leave it out.
    """
    state = {
        **(rest or {}),
        "epoch": progress.epoch,
        "global_step": progress.step,
        "state_dict": _weights(module, rest),
        **module.hyperparameters_to_save(),
    }
    module.on_save_checkpoint(state)
    return state


def _weights(module: Module, rest: Mapping[str, Any] | None) -> Any:
    """The module's; of one on the meta device those that its workers had at the end."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        return module.state_dict()
    if rest is None or not rest.get("state_dict"):
        raise CheckpointError(
            "save_checkpoint: the module is on the meta device, and the weights are in the checkpoints of its fit "
            "alone; save with a ModelCheckpoint, or without weights_only."
        )
    return rest["state_dict"]


class Captured:
    """A state that workers have copied aside; `resolve` fetches it, whenever that is wanted.

    Args:
        copies: Every worker's part.
        driver: The driver's part: counters, metrics, callbacks.
    """

    def __init__(self, copies: Copies, driver: dict[str, Any]) -> None:
        self._copies, self.driver = copies, driver

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Captured:
        """One that gives this checkpoint, which is in this process."""
        return cls(Copies(lambda: ([{"state_dict": state["state_dict"]}], None)), dict(state))

    @property
    def complete(self) -> bool:
        """Whether the death of a worker no longer keeps it from being fetched."""
        return self._copies.complete()

    def resolve(self) -> dict[str, Any]:
        """The checkpoint as one dict; pieces of tensors may be where they were.

        Raises:
            Exception: The parts are gone with the workers that had them.
        """
        found, pieces = self._copies.fetch()
        parts = [kept(part) for part in found]
        joined: dict[str, Any] = {**next(part for part in parts if "state_dict" in part), **self.driver}
        for name in ("own", KEY):
            by_rank = [part[name] for part in parts if name in part]
            if by_rank:
                joined[name] = by_rank
        if pieces is not None:
            joined[KEY] = pieces
        return joined

    def giving(self, state: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        """Returns `state`, made of what `resolve` gave. It holds this object, as the memory of its tensors is
        used for the next capture when nobody does."""

        def give() -> dict[str, Any]:
            assert self is not None
            return state

        return give


@dataclass(eq=False)
class _Job:
    """Something to be done to a path; afterwards it `exists`, or does not."""

    path: str
    exists: bool
    do: Callable[[], None]
    moment: object = None
    on_error: Callable[[StorageError], None] | None = None


class CheckpointWriter:
    """Writes and removes checkpoints in order, in one background thread, which lives as long as there is work.

    A failure is raised by the next call, or by `flush`: a checkpoint is never lost silently. Until it has been raised,
    older checkpoints are not removed either. One case is only logged: the state is gone with workers that have been
    replaced meanwhile, since training then goes on from an earlier state anyway. Another is left to whoever asked for
    the checkpoint, if it could not be written; then what is to be removed next, in favour of it, stays.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()  # the first is being done
        self._thread: threading.Thread | None = None
        self._ended = True  # the thread takes nothing more up, if there was one
        self._expecting = False  # the thread waits for something to do
        self._error: BaseException | None = None
        self._left_alone = False  # whether the last save has failed, and what it was to replace is to stay
        self._given_up = False  # nothing more of what there is to do is done

    def __reduce__(self) -> Any:
        return CheckpointWriter, ()  # a copy has nothing to write

    def save(
        self,
        path: str,
        resolve: Callable[[], dict[str, Any]],
        on_error: Callable[[StorageError], None] | None = None,
        moment: object = None,
    ) -> None:
        """Write what `resolve` returns; it is called in the background.

        Args:
            path: Where to.
            resolve: Gives the checkpoint.
            on_error: Called in the background if it cannot be written, which is then no failure.
            moment: See `await_others`.
        """

        def write() -> None:
            try:
                write_checkpoint(path, resolve(), lambda: self._given_up)
            finally:
                release(path)

        # at most one state waits while another is written, so that memory stays bounded
        self.await_others(moment, left=1)
        self._submit(_Job(path, True, write, moment, on_error))

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Around the wait for workers and `save`: the thread is started in that wait, and not after it."""
        try:
            with shield(), self._changed:
                self._expecting = True
                self._start()
            yield
        finally:
            self._expecting = False
            with self._changed:
                self._changed.notify_all()

    def await_others(self, moment: object = None, left: int = 0) -> None:
        """Wait until at most so many states that have been announced are still to be written.

        Args:
            moment: Of a state that is to come. Those of the same one are not waited for: they share their memory.
            left: How many.
        """
        self._wait(lambda: sum(job.exists and (moment is None or job.moment != moment) for job in self._jobs) <= left)

    def await_room(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, or nothing is left to do. What has failed is raised, as it holds its state."""
        self._wait(lambda: not self._jobs or condition())
        self._raise()

    def remove(self, path: str, on_error: Callable[[StorageError], None] | None = None) -> None:
        """Delete a checkpoint, after everything asked for before.

        Args:
            path: Where it is.
            on_error: Called in the background if it cannot be deleted, which is then no failure.
        """
        self._submit(_Job(path, False, lambda: remove_checkpoint(path), on_error=on_error))

    def exists(self, path: str) -> bool:
        """Whether it is there, or will be."""
        with self._changed:
            pending = [job.exists for job in self._jobs if job.path == path]
        return pending[-1] if pending else checkpoint_exists(path)

    def give_up(self) -> None:
        """From any thread: there is no time for what there is to do. What is half written is deleted; `flush` raises
        GivenUpError."""
        with self._changed:
            self._given_up = bool(self._jobs)

    @property
    def busy(self) -> bool:
        """Whether there is something left to do."""
        return bool(self._jobs)

    def flush(self) -> None:
        """Wait until all is done and the thread has ended; raise what failed.

        The first Ctrl-C, or a SIGTERM, is heard when what has been announced is on the disk; another Ctrl-C ends the
        wait, and the thread goes on by itself.
        """
        asked_to_end: BaseException | None = None
        while True:
            try:
                self._wait(lambda: not self._jobs)
                if self._thread is not None and not self._expecting:
                    self._thread.join()  # it has nothing left to do
                break
            except (KeyboardInterrupt, SystemExit) as error:
                if asked_to_end is not None:
                    raise
                asked_to_end = error
                log.warning("A checkpoint is still being written. Ctrl-C (once more) leaves without waiting for it.")
        if asked_to_end is not None:
            raise asked_to_end
        self._raise()

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait in short pieces, so that Ctrl-C is heard in each."""
        while True:
            with self._changed:
                if self._changed.wait_for(condition, PIECE):
                    return
            hear()

    def _submit(self, job: _Job) -> None:
        self._raise()
        with shield(), self._changed:
            self._jobs.append(job)
            self._start()
            self._changed.notify_all()

    def _start(self) -> None:
        if self._ended:
            self._ended = False
            # no daemon: what has been announced is written even where the driver's process ends
            self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=False)
            self._thread.start()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if isinstance(error, StateLostError) and error.superseded():
            log.warning("A checkpoint has not been written: %s", error)
        elif error is not None:
            raise error

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._expecting and not self._jobs:
                    self._changed.wait(PIECE)
                if not self._jobs:
                    self._ended, self._given_up = True, False
                    return
                job = self._jobs[0]
            try:
                if self._given_up:
                    raise GivenUpError(f"{job.path}: there was no time to {'write' if job.exists else 'remove'} it.")
                if job.exists or not (self._error or self._left_alone):
                    self._left_alone = False
                    job.do()
            except StorageError as error:
                if job.on_error is None:
                    self._error = self._error or error
                else:
                    self._left_alone = job.exists
                    job.on_error(error)
            except BaseException as error:
                self._error = self._error or error
            finally:
                with self._changed:
                    self._jobs.popleft()
                    del job  # and with it the state
                    self._changed.notify_all()
