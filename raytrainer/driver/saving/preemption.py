"""`Preemption`: what a `fit` does about SIGTERM, where it goes, and what is told of it.

When the signal acts is `driver/loop/interrupt.py`'s, at which step the coordinator's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from raytrainer.callbacks import Callback, ModelCheckpoint, WorkerCallback
from raytrainer.checkpointing.places import checkpoint_exists, is_link, lies_in, newest_checkpoint, written_at
from raytrainer.checkpointing.reservations import release, reserve
from raytrainer.plan.retention import free_name
from raytrainer.plan.uris import join_path
from raytrainer.signals import terminate

__all__ = ["NAME", "Preemption", "default_grace", "say_interrupted"]

log = logging.getLogger("raytrainer")

#: The checkpoint's name, without ".ckpt": the same again for a run that goes on, so that many preemptions leave one.
STEM = "preempted"
NAME = f"{STEM}.ckpt"

#: Seconds, where nothing else is known: schedulers leave 30 s, of which the rest of the end takes some.
GRACE = 20.0

#: Seconds that Ray leaves a job after `ray job stop`, unless RAY_JOB_STOP_WAIT_TIME_S says otherwise.
JOB_STOP = 3.0

#: What Ray gives to the scripts of jobs, in their environment.
OF_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

#: The part of that time which is for saving; the rest is for the run's end.
SHARE = 0.75


def default_grace() -> float:
    """Seconds from SIGTERM until a checkpoint has to be there: fewer in a job of Ray's, which is killed after three."""
    if OF_A_JOB not in os.environ:
        return GRACE
    try:
        leaves = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", JOB_STOP))
    except ValueError:
        leaves = JOB_STOP
    return min(GRACE, SHARE * leaves)


@dataclass(eq=False)
class Preemption:
    """What one Trainer does about SIGTERM.

    Args:
        grace: Seconds from SIGTERM until the checkpoint is there, or is given up; 0: none is written; None: see
            `default_grace`.
        exit_code: With which the process ends; None: `fit` returns.

    Attributes:
        saved: The checkpoint that the run in progress has ended with.
    """

    grace: float | None = None
    exit_code: int | None = 143
    saved: str | None = field(default=None, init=False)

    def seconds(self, callbacks: Sequence[Callback | WorkerCallback]) -> float:
        """The time for saving; none where there is no `ModelCheckpoint`, so that nobody wants checkpoints."""
        if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
            return 0.0
        return default_grace() if self.grace is None else self.grace

    def save(
        self,
        callbacks: Sequence[Callback | WorkerCallback],
        write: Callable[[str], object],
        step: int,
        when: Callable[[], str],
        begun_with: str | None = None,
    ) -> None:
        """Have the checkpoint written; what goes wrong is told.

        Args:
            callbacks: Of the run; it goes beside the checkpoints of the first `ModelCheckpoint`.
            write: Writes it to a path.
            begun_with: The checkpoint that the run went on from.
            step: Of which it is.
            when: When that was, for the line that says so.
        """
        folder = next((c.dirpath for c in callbacks if isinstance(c, ModelCheckpoint) and c.dirpath), None)
        if folder is None:
            return
        path = ""
        try:
            path = _path(folder, begun_with)
            write(path)
        except BaseException as error:
            release(path)
            if not isinstance(error, Exception):  # the time is over, or Ctrl-C
                raise
            log.warning("Step %d could not be saved: %s", step, error)
        else:
            self.saved = path
            log.warning(
                'Preempted at step %d, saved as %s, %s; fit(..., ckpt_path="last") goes on from it.',
                step, path, when(),
            )  # fmt: skip

    def say_lost(self, callbacks: Sequence[Callback | WorkerCallback], step: int) -> None:
        """Say from where a run goes on that could not be saved."""
        folders = {c.dirpath for c in callbacks if isinstance(c, ModelCheckpoint) and c.dirpath}
        newest = newest_checkpoint(folders)
        log.warning(
            "Preempted at step %d, of which there is no checkpoint. %s", step,
            "There is none at all yet." if newest is None
            else f'fit(..., ckpt_path="last") goes on from the newest one, {newest}.',
        )  # fmt: skip

    def end(self, ends_anyway: bool) -> SystemExit | None:
        """What ends the process after SIGTERM; None: nothing does."""
        if self.exit_code is None and not ends_anyway:
            return None
        return terminate() if self.exit_code is None else SystemExit(self.exit_code)


def _path(folder: str, begun_with: str | None) -> str:
    """Where it goes: over an earlier one only where this run went on from that, or from something later beside it.

    Any other may be all there is of another run: of one that shares the folder and was preempted with this one, say.
    """
    usual = join_path(folder, NAME)
    if begun_with is not None and lies_in(begun_with, folder) and not is_link(usual):
        there, followed = written_at(usual), written_at(begun_with)
        if there is not None and followed is not None and there <= followed:
            return usual

    def taken(name: str) -> bool:
        path = join_path(folder, name)
        return checkpoint_exists(path) or not reserve(path)

    return join_path(folder, free_name(STEM, ".ckpt", taken))


def say_interrupted(callbacks: Sequence[Callback | WorkerCallback], step: int, begun_with: str | None) -> None:
    """Say, after Ctrl-C, from where another run goes on.

    Args:
        callbacks: Of the run.
        step: At which it has ended.
        begun_with: The checkpoint that it went on from itself.
    """
    savers = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint) and callback.dirpath]
    if not savers:
        return
    newest = newest_checkpoint({str(saver.dirpath) for saver in savers}) or begun_with
    remedy = "ModelCheckpoint(save_last=True) saves the end of training too, also after Ctrl-C."
    if newest is None:
        log.info("Interrupted at step %d; there is no checkpoint yet. %s", step, remedy)
    elif max(saver.saved_step for saver in savers) == step:
        log.info('Interrupted at step %d, saved as %s; fit(..., ckpt_path="last") goes on from it.', step, newest)
    else:
        log.info(
            'Interrupted at step %d, of which there is no checkpoint; fit(..., ckpt_path="last") goes on from the '
            "newest one, %s. %s", step, newest, remedy,
        )  # fmt: skip
