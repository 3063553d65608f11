"""The arguments of a `Trainer` that only the driver needs: cluster, loggers, callbacks. `RunArguments` has the others.

Those declared as `InitVar` become objects, which the Trainer's property of the same name shows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import InitVar
from typing import Any

from raytrainer.loggers.logger import Logger
from raytrainer.plan import argument_checks as checks
from raytrainer.plan.declaring import argument, arguments
from raytrainer.plan.run_arguments import RunArguments
from raytrainer.profilers.profiler import Profiler
from raytrainer.stateful_callback import StatefulCallback

__all__ = ["TrainerArguments"]


@arguments
class TrainerArguments(RunArguments):
    """All arguments of a `Trainer`."""

    # ---------------------------------------------------------------- the cluster

    address: str | None = argument(default=None)
    """The Ray cluster to train on: "HOST:PORT" of one that this machine belongs to, "ray://HOST:PORT" of one that it
    does not, "auto": the one that `ray start` has made on this machine, "local": a new one. None: the Ray that is
    initialised, else RAY_ADDRESS, else as "auto", else one is started."""

    runtime_env: Mapping[str, Any] | None = argument(default=None)
    """What workers need beside what is installed where they run, as for `ray.init`; used when this trainer starts Ray
    or attaches to a cluster. None: on a cluster a copy of the script's directory; {}: nothing."""

    placement_timeout: float = argument(default=60.0, check=checks.seconds)
    """Seconds to wait until the cluster has what is asked for."""

    idle_timeout: float = argument(default=300.0, check=checks.seconds)
    """Seconds that unused workers are kept for the next run, unless others in the cluster wait for what they hold; 0:
    not at all."""

    # ---------------------------------------------------------------- when the machine is wanted back

    preemption_grace: float | None = argument(default=None, check=checks.seconds_or_none)
    """Seconds from SIGTERM within which `fit` saves the step that it is in, as "preempted.ckpt" beside the checkpoints
    of its `ModelCheckpoint`. What does not fit is given up; `ckpt_path="last"` goes on from the newest that there is.
    0: no checkpoint is made. None: 20; in a job of Ray's three quarters of what `ray job stop` leaves, so 2.25."""

    preemption_exit_code: int | None = argument(default=143, check=checks.exit_code)
    """The status with which the process ends after SIGTERM (as `SystemExit`). None: `fit` returns, with
    `trainer.preempted`, and the script decides; the weights are in the checkpoint."""

    # ---------------------------------------------------------------- what is told, and where it goes

    logger: InitVar[Logger | Iterable[Logger] | bool | None] = argument(default=True)
    """A logger, a list of them, False for none, True for a `CSVLogger` in `default_root_dir`."""

    profiler: InitVar[str | Profiler | None] = argument(default=None)
    """"simple" (a table of hooks and their times), "advanced" (cProfile), "pytorch" (torch.profiler, a Chrome trace for
    each worker), or a `Profiler`. Reports go to `profile/` in the log directory."""

    callbacks: InitVar[StatefulCallback | Iterable[StatefulCallback] | None] = argument(default=None)
    """`Callback`s, which run on the driver, and `WorkerCallback`s, which run beside the module."""

    enable_progress_bar: bool = argument(default=True, check=checks.boolean)
    """Show progress: a live bar on a terminal, a line an epoch elsewhere."""

    enable_model_summary: bool = argument(default=True, check=checks.boolean)
    """Print a table of the module's parts before training."""

    enable_checkpointing: bool = argument(default=True, check=checks.boolean)
    """Save the latest checkpoint at each epoch's end, if no `ModelCheckpoint` is given."""

    default_root_dir: InitVar[str | os.PathLike[str] | None] = argument(default=None)
    """Where logs and checkpoints go [the working directory]."""

    def __post_init__(
        self,
        logger: Logger | Iterable[Logger] | bool | None,
        profiler: str | Profiler | None,
        callbacks: StatefulCallback | Iterable[StatefulCallback] | None,
        default_root_dir: str | os.PathLike[str] | None,
    ) -> None:
        """What is made of the arguments: the Trainer does that."""
        raise NotImplementedError
