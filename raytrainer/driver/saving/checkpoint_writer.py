"""Checkpoints on the driver: what was captured, and a thread that writes it while training goes on."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from raytrainer.checkpointing.checkpoint_format import write_checkpoint
from raytrainer.checkpointing.places import checkpoint_exists, remove_checkpoint
from raytrainer.errors import StateLostError
from raytrainer.module import Module
from raytrainer.plan.steps_and_epochs import Progress

__all__ = ["Captured", "CheckpointWriter", "idle_checkpoint"]

log = logging.getLogger("raytrainer")


def idle_checkpoint(module: Module, progress: Progress) -> dict[str, Any]:
    """The state of a module that no workers have: the driver's own weights, without what only resuming needs."""
    state = {
        "epoch": progress.epoch,
        "global_step": progress.step,
        "state_dict": module.state_dict(),
        **module.hyperparameters_to_save(),
    }
    module.on_save_checkpoint(state)
    return state


class Captured:
    """A state that workers have copied aside; `resolve` fetches it, whenever that is wanted.

    Args:
        fetch: Returns every worker's part, by rank.
        driver: The driver's part: counters, metrics, callbacks.
    """

    def __init__(self, fetch: Callable[[], list[dict[str, Any]]], driver: dict[str, Any]) -> None:
        self._fetch, self.driver = fetch, driver

    def resolve(self) -> dict[str, Any]:
        """The checkpoint as one dict.

        Raises:
            Exception: The parts are gone with the workers that had them.
        """
        parts = self._fetch()
        own = [part["own"] for part in parts if "own" in part]
        main = next(part for part in parts if "state_dict" in part)
        return {**main, **({"own": own} if own else {}), **self.driver}


class CheckpointWriter:
    """Writes and removes checkpoints in order, in one background thread.

    A failure is raised by the next call, or by `flush`: a checkpoint is never lost silently. Until it has been raised,
    older checkpoints are not removed either. One case is only logged: the state is gone with workers that have been
    replaced meanwhile, since training then goes on from an earlier state anyway.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[tuple[str, bool, Callable[[], None]] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._pending: dict[str, bool] = {}  # path -> whether it will exist

    def save(self, path: str, resolve: Callable[[], dict[str, Any]]) -> None:
        """Write what `resolve` returns; it is called in the background."""
        # at most one state waits while another is written, so that memory stays bounded
        if self._jobs.qsize() > 1:
            self._jobs.join()
        self._submit(path, True, lambda: write_checkpoint(path, resolve()))

    def remove(self, path: str) -> None:
        """Delete a checkpoint, after everything asked for before."""
        self._submit(path, False, lambda: remove_checkpoint(path))

    def exists(self, path: str) -> bool:
        """Whether it is there, or will be."""
        with self._lock:
            if path in self._pending:
                return self._pending[path]
        return checkpoint_exists(path)

    def flush(self) -> None:
        """Wait until all is done; raise what failed; end the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self._raise()

    def _submit(self, path: str, exists: bool, job: Callable[[], None]) -> None:
        self._raise()
        with self._lock:
            self._pending[path] = exists
        self._jobs.put((path, exists, job))
        if self._thread is None:
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
            item = self._jobs.get()
            try:
                if item is None:
                    return
                path, exists, job = item
                if exists or self._error is None:
                    job()
            except BaseException as error:
                self._error = self._error or error
            finally:
                self._jobs.task_done()
            with self._lock:
                if not any(path == waiting[0] for waiting in list(self._jobs.queue) if waiting):
                    self._pending.pop(path, None)
