"""`TrainerRuns`: how a Trainer's arguments become settings, loggers and callbacks, and these a run."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import torch

from raytrainer.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    WorkerCallback,
)
from raytrainer.callbacks._numbers import format_value
from raytrainer.callbacks.arrange import arrange_callbacks
from raytrainer.callbacks.gradient_accumulation_scheduler import with_accumulation
from raytrainer.cells import html_table
from raytrainer.datamodule import DataModule
from raytrainer.driver.cluster.session import Cluster, attached, own_reservation
from raytrainer.driver.prepare.former_hooks import refuse_former_hooks
from raytrainer.driver.prepare.hook_arguments import require_hook_arguments
from raytrainer.driver.prepare.short_runs import short_settings
from raytrainer.driver.reporting.run_loggers import Logs, make_loggers
from raytrainer.driver.run import Run
from raytrainer.driver.saving.checkpoint_writer import Captured, CheckpointWriter
from raytrainer.driver.saving.preemption import Preemption
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.driver_arguments import TrainerArguments
from raytrainer.gpu.choice import count_all
from raytrainer.gpu.nvml import open_nvml
from raytrainer.loggers import Logger
from raytrainer.loggers.logger import first_log_dir
from raytrainer.module import Module
from raytrainer.plan import argument_checks as checks
from raytrainer.plan.declaring import checked
from raytrainer.plan.names_elsewhere import absent_of_a_trainer
from raytrainer.plan.nearest_names import nearly
from raytrainer.plan.run_arguments import RunArguments
from raytrainer.plan.settings import Settings, settle
from raytrainer.profilers import Profiler, make_profiler
from raytrainer.seeding import last_seed
from raytrainer.stateful_callback import StatefulCallback
from raytrainer.task import Task
from raytrainer.view.last_trainer import remember_trainer
from raytrainer.view.run_state import RunState, TrainerState
from raytrainer.view.trainer_properties import TrainerProperties

__all__ = ["Fitted", "TrainerRuns"]


@dataclass(frozen=True)
class Fitted:
    """A fit that has ended.

    Attributes:
        module: What was trained.
        end_state: What a checkpoint of its end holds beside the weights; None: it is not to be had.
    """

    module: Module
    end_state: Captured | None


class TrainerRuns(TrainerProperties, TrainerArguments):
    """What all verbs of a `Trainer` share."""

    def __post_init__(
        self,
        logger: Logger | Iterable[Logger] | bool | None,
        profiler: str | Profiler | None,
        callbacks: StatefulCallback | Iterable[StatefulCallback] | None,
        default_root_dir: str | os.PathLike[str] | None,
    ) -> None:
        cluster = Cluster(self.address, self.runtime_env)
        # a Ray Tune trial has its share of the cluster already, and is like a machine of its own
        on_cluster = attached(cluster) and own_reservation() is None
        gpus, seed = self.gpus, last_seed() if self.seed is None else self.seed
        if gpus in (-1, "-1") and (self.strategy == "local" or not on_cluster):
            gpus = count_all(open_nvml())
        self.__dict__.update(checked(vars(self), TrainerArguments, beyond=RunArguments))
        self._take_settings(settle(self, on_cluster, gpus=gpus, seed=seed))
        self._default_root_dir = checks.local_folder("default_root_dir", default_root_dir)
        self._every_gpu = self._settings.gpus == -1
        self._groups = GroupSupply(cluster, self.placement_timeout, self.idle_timeout)
        self._profiler = make_profiler(profiler)
        self._loggers = [] if self.fast_dev_run else make_loggers(logger, self._default_root_dir)
        self._logs = Logs(self._loggers)
        # module code may call self.logger in a dry run too, to no effect
        self._worker_logs = True if self._loggers else False if self.fast_dev_run and logger else None
        extras: list[Callback] = []
        if self.enable_progress_bar:
            extras.append(ProgressBar())
        if self.enable_model_summary:
            extras.append(ModelSummary())
        if self.enable_checkpointing and not self.fast_dev_run:
            extras.append(ModelCheckpoint())
        self._own_callbacks = arrange_callbacks(callbacks, extras)
        self._callbacks = self._own_callbacks
        self._state = RunState()
        self._writer = CheckpointWriter()
        self._module: Module | None = None
        self._datamodule: DataModule | None = None
        self._run: Run | None = None  # the latest
        self._fitted: Fitted | None = None
        self._probing = False  # whether this is a copy of a Trainer, for a short run that finds something out

    def __repr__(self) -> str:
        """What it trains on and until when, and what it has done."""
        settings, state = self._settings, self._state.trainer
        where = (
            "this process" if settings.strategy == "local" else f"{settings.strategy}, {settings.world_size} workers"
        )
        limits = [f"{name}={getattr(settings, name)}" for name in ("max_epochs", "max_steps", "max_time")
                  if getattr(settings, name) not in (None, -1)]  # fmt: skip
        done = f"{state.fn} {state.status}, epoch {self.current_epoch}, step {self.global_step}" if self._run else "new"
        return f"<Trainer: {', '.join([where, *limits])}; {done}>"

    def _repr_html_(self) -> str:
        """For notebooks: the same, and the metrics."""
        rows = [(name, format_value(value.item())) for name, value in sorted(self.callback_metrics.items())]
        return html_table([("Metric", "Value"), *rows], [repr(self)[1:-1]], numbers=[1])

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: the run, and what the workers of the last fit have left."""
        fitted = None if self._fitted is None else replace(self._fitted, end_state=None)
        return {**self.__dict__, "_run": None, "_fitted": fitted}

    def _take_settings(self, settings: Settings) -> None:
        """Go on with these settings, and show them as this Trainer's arguments."""
        self._settings = settings
        shown = {declared.name: getattr(settings, declared.name) for declared in fields(RunArguments)}
        for name in ("max_epochs", "max_steps"):
            shown[name] = -1 if shown[name] is None else shown[name]
        self.__dict__.update(shown)

    if not TYPE_CHECKING:  # which would take any name for one that there is

        def __getattr__(self, name: str) -> Any:
            """Asked for a name that there is not."""
            if name.startswith("_"):  # Python's own questions, as in copying, say
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            if hasattr(type(self), name):  # a property, whose own AttributeError is the one to tell
                return object.__getattribute__(self, name)
            raise AttributeError(absent_of_a_trainer(name, dir(self)))

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in (known := dir(self)) and (meant := nearly(name, known)):
            raise AttributeError(f"trainer.{name} = ...: a Trainer has no {name!r}; did you mean {meant!r}?")
        try:
            super().__setattr__(name, value)
        except FrozenInstanceError:
            raise AttributeError(f"trainer.{name} stays as it is: make a new Trainer({name}={value!r}, ...).") from None

    @property
    def callbacks(self) -> list[Callback | WorkerCallback]:
        """Those of the last run, in the order in which they are called."""
        return self._callbacks

    @property
    def checkpoint_callback(self) -> ModelCheckpoint | None:
        """The first `ModelCheckpoint`."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        """All of them."""
        return [callback for callback in self._callbacks if isinstance(callback, ModelCheckpoint)]

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        """The first `EarlyStopping`."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        """All of them."""
        return [callback for callback in self._callbacks if isinstance(callback, EarlyStopping)]

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        """The one that shows progress."""
        return next((callback for callback in self._callbacks if isinstance(callback, ProgressBar)), None)

    def _probe(self, callbacks: list[Callback | WorkerCallback], loggers: list[Logger], **settings: Any) -> Self:
        """A copy of this Trainer for a short run of its own that writes nothing, with other `settings`."""
        probe = copy.copy(self)
        probe._probing, probe._profiler = True, None
        probe._own_callbacks = probe._callbacks = callbacks
        probe._loggers, probe._logs, probe._worker_logs = loggers, Logs(loggers), False
        probe._state, probe._writer, probe._run = RunState(), CheckpointWriter(), None
        probe._take_settings(short_settings(self._settings, **settings))
        return probe

    def _begin(self, stage: str, module: Module, datamodule: DataModule | None, loaders: dict[str, Any]) -> Run:
        """A run with a fresh state, not started yet."""
        if self._every_gpu:
            self._take_settings(self._groups.with_every_gpu(self._settings))
        self._module, self._datamodule = module, datamodule
        self._remember_me(module, datamodule)
        previous = self._state.progress
        self._state = RunState(TrainerState(fn=stage))
        self._logs = Logs(self._loggers)
        if stage != "fit":  # counters of the last fit stay visible
            self._state.progress = previous
        try:
            given = None if self._probing else module.configure_callbacks()
        except BaseException as error:
            self._state.interrupted = isinstance(error, KeyboardInterrupt)
            self._state.trainer.status = "interrupted" if self._state.interrupted else "failed"
            raise
        self._callbacks = arrange_callbacks(given, self._own_callbacks)
        refuse_former_hooks(module, datamodule, self._callbacks)
        require_hook_arguments(module, datamodule, self._callbacks)
        if stage == "fit":
            self._require_writable()
        self._take_settings(with_accumulation(self._settings, self._callbacks))
        task = self._task(stage, module, datamodule, loaders)
        self._run = run = Run(
            task, self._state, self._callbacks, _emitter(self), self._logs, self._groups, self._writer, self._probing,
            Preemption(self.preemption_grace, self.preemption_exit_code),
        )  # fmt: skip
        return run

    def _require_writable(self) -> None:
        """See to the folders that will be written to while training."""
        self._logs.require_writable()
        for callback in self._callbacks:
            if isinstance(callback, ModelCheckpoint) and not self.fast_dev_run:
                callback.require_writable()

    def _remember_me(self, module: Module, datamodule: DataModule | None) -> None:
        """Have `module.trainer` and `datamodule.trainer` be this one when the run is over."""
        parts = [part for part in module.modules() if isinstance(part, Module)]
        for owner in (*parts, datamodule):
            if owner is not None and not self._probing:
                remember_trainer(owner, self)

    def _task(self, stage: str, module: Module, datamodule: DataModule | None, loaders: dict[str, Any]) -> Task:
        seed = self._settings.seed
        return Task(
            stage=stage,
            module=module,
            datamodule=datamodule,
            settings=self._settings,
            callbacks=[c for c in self._callbacks if isinstance(c, WorkerCallback)],
            loaders=loaders,
            # torch's own generator, so that a user's torch.manual_seed makes a run repeatable
            counters=(self.global_step, self.current_epoch),
            seed=int(torch.randint(2**62, ())) if seed is None else seed,
            reseed=seed is not None or self._settings.strategy != "local",
            default_root_dir=self.default_root_dir,
            log_dir=None if stage == "predict" else first_log_dir(self._loggers),
            logs=self._worker_logs,
            profiler=self._profiler,
        )

    def _emit(self, hook: str, *args: Any, around: Callable[[str], AbstractContextManager[Any]] = nullcontext) -> None:
        """Call a hook of the driver's callbacks, those that save last; each inside what `around` makes of its name."""
        for callback in self._callbacks:
            if isinstance(callback, Callback):
                with around(f"{type(callback).__name__}.{hook}"):
                    getattr(callback, hook)(self, self._module, *args)


def _emitter(trainer: TrainerRuns) -> Callable[..., None]:
    """`trainer._emit`, for a run that the Trainer holds: it must not hold the Trainer."""
    reference = weakref.ref(trainer)

    def emit(hook: str, *args: Any, **options: Any) -> None:
        found = reference()
        if found is not None:
            found._emit(hook, *args, **options)

    return emit
