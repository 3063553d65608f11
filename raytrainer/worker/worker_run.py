"""`WorkerRun`: one worker's part of one fit, validate, test or predict, set up and ready."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from raytrainer.ending import Ending
from raytrainer.gpu.memory import samplers
from raytrainer.messages import PlateauWish, SetupReport
from raytrainer.metric_messages import MetricSpec
from raytrainer.metrics.metric_objects import compute, states_of
from raytrainer.metrics.metric_store import MetricStore
from raytrainer.module import Module
from raytrainer.place_in_run import take_place
from raytrainer.plan.seeds import derive_seed
from raytrainer.private.transformers_private import note_what_is_recorded
from raytrainer.quick_imports import importing
from raytrainer.seeding import restore_rng, seed_generators
from raytrainer.strategies.strategy import Strategy
from raytrainer.task import Task
from raytrainer.view.trainer_view import TrainerView
from raytrainer.worker.attribute_snapshots import AttributeSnapshots
from raytrainer.worker.compiling import compile_module
from raytrainer.worker.given_optimizer import GivenOptimizer
from raytrainer.worker.hook_calls import Hooks, overridden, watching
from raytrainer.worker.logger_recorder import Recorder, WorkerLogger
from raytrainer.worker.node_slices import Slices
from raytrainer.worker.optimizers import check_parameters, parse_optimizers
from raytrainer.worker.precision import Precision
from raytrainer.worker.run_data import RunData
from raytrainer.worker.signatures import bind_step
from raytrainer.worker.switched_parts import SwitchedParts
from raytrainer.worker.torch_flags import apply_flags

__all__ = ["WorkerRun"]


class WorkerRun:
    """Holds what the loops of one run share: module, view, hooks, feeds, precision, strategy.

    Args:
        task: What the driver sent.
        strategy: This worker's side of the strategy.
        replaceable: Whether another worker may come in this one's place, and go on.
    """

    def __init__(self, task: Task, strategy: Strategy, replaceable: bool = False) -> None:
        self.task, self.strategy, self._replaceable = task, strategy, replaceable
        strategy.resumes = task.resuming
        if strategy.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(strategy.device)
        self.profiler = task.profiler
        if self.profiler is not None:
            self.profiler.start(strategy.ranks.rank, strategy.device)
        self.module, self.datamodule = task.module, task.datamodule
        settings = task.settings
        self.view = TrainerView(
            settings=settings,
            ranks=strategy.ranks,
            strategy=strategy,
            stage=task.stage,
            default_root_dir=task.default_root_dir,
            log_dir=task.log_dir or task.default_root_dir,
            callbacks=task.callbacks,
            datamodule=task.datamodule,
        )
        self.view.global_step, self.view.current_epoch = task.counters
        self.view.metrics = MetricStore(strategy.ranks.rank, settings.log_every_n_steps, self.module)
        rank_zero = strategy.ranks.rank == 0
        self.recorder = Recorder(self.view, lambda: self.stepped, keeps=bool(task.logs) and rank_zero)
        self.view.logger = None if task.logs is None else WorkerLogger(self.recorder)
        self.view.metrics.calls, self.view.metrics.mark = self.recorder.take, self.mark
        self.slices = Slices(strategy, self.view.metrics)
        self.data = RunData(task, strategy)
        self.data.epoch = lambda: self.view.current_epoch
        self.view.loader_source, self.view.length_source = self.data.loader, self.data.lengths
        self.view.epoch_length_source = self.data.length_in
        watched = watching(self.module, strategy.device_mesh)
        self.hooks = Hooks(self.view, self.module, task.callbacks, self.profiled, watched)
        self.precision = Precision(settings.precision, strategy.device, strategy.agree_on_infinities)
        # Whether a chunk is reported while the device is still at its last batch, which comes with the next report.
        # Not with a gradient scaler: to count the steps that it has left out, one waits for the device anyway.
        self.ahead = strategy.device.type == "cuda" and self.precision.scaler is None
        self.view.unscale = self.precision.unscale
        self.view.skipped_source = lambda: self.precision.skipped_steps
        self.transfer: Callable[[Any, int], Any] | None = None
        self.evaluation_calls: dict[str, Any] = {}  # see `calls_of`
        self.evaluated = {"validate": 0, "test": 0, "predict": 0}  # batches so far, the step axis of on_step values
        self.stepped = 0  # batches that ended in a step: the loggers' step axis
        self.rng: dict[str, Any] | None = None  # generators' state to go on from, when training resumes
        self.attributes: AttributeSnapshots | None = None  # if `replaceable`
        self.put_back: Callable[[], None] = lambda: None  # what hooks have changed that begin a run, where it goes on
        self.epoch_began = False  # `on_train_epoch_start` has been, for the epoch in progress
        self.stepped_epoch = -1  # after which schedulers that count epochs have been stepped last
        self.accumulating = False  # in the middle of an accumulation: gradients must survive a validation
        self._shaped: str | None = None  # what strategy and precision say of the form that they have given the module
        self._undo_flags = apply_flags(settings)
        self._undo_compile: Callable[[], None] = lambda: None
        self._leave_place = take_place(strategy.ranks, strategy.share.index, strategy.share.count)

    # ---------------------------------------------------------------- set-up

    def setup(self) -> SetupReport:
        """Everything up to, and without, `on_fit_start`."""
        task, module, view, settings = self.task, self.module, self.view, self.task.settings
        self._attach(view)
        if self.datamodule is not None:
            self.datamodule.trainer = view
        if task.reseed:
            # all draw the same until the module has its form: parts of a dataset that is split, weights
            seed_generators(derive_seed(task.seed, "rank", 0))
        self.strategy.place(module)
        if self.datamodule is not None:
            self.datamodule.setup(task.stage)
        self.hooks.call("setup", task.stage)
        with self.strategy.building(module):
            self.hooks.watched("configure_model", module.configure_model)()
        self._attach(view)
        shaped = self.strategy.shape(module, self.precision.convert_module, task.settings.sync_batchnorm)
        note_what_is_recorded(module)
        self._shaped = "\n".join(line for line in (shaped, self.precision.said) if line) or None
        if task.reseed and (own := self.strategy.stream) != 0:
            seed_generators(derive_seed(task.seed, "rank", own))
        if task.stage == "fit" and not module.training:
            module.train()
        transfer = self.data.bind_transfer(self.hooks, self.precision.convert_input)
        self.transfer = None if transfer is None else self.profiled("transfer_batch_to_device", transfer)
        if task.stage == "fit" and settings.log_gpu_memory is not None:
            view.samplers += samplers(settings.log_gpu_memory, self.strategy.device, self.strategy.ranks.node_rank)
        self.switched = SwitchedParts(module)
        if task.stage == "fit" and self._replaceable:
            self.attributes = AttributeSnapshots(module)
        if not task.resuming:
            self.configure()
        return self.describe()

    def configure(self) -> None:
        """Make the optimizers; those of a resumed run once the checkpoint's weights are in the module."""
        module, view = self.module, self.view
        if self.task.stage == "fit":
            with importing():  # torch imports its compiler for a process's first optimizer
                given = self.hooks.watched("configure_optimizers", module.configure_optimizers)()
            if overridden(module, "configure_optimizers"):
                manual, own_step = not module.automatic_optimization, overridden(module, "lr_scheduler_step")
                parsed = parse_optimizers(given, manual=manual, own_step=own_step)
                view.optimizers, view.lr_scheduler_configs = parsed
            for optimizer in view.optimizers:
                self.strategy.check_optimizer(optimizer)
            view.given_optimizers = [GivenOptimizer(optimizer, module) for optimizer in view.optimizers]
            self.switched.note(view.optimizers)
            check_parameters(module, view.optimizers)
        if self.task.settings.compile is not None and not self.strategy.compiles_blocks:
            self._undo_compile = compile_module(module, self.task.settings.compile)

    def describe(self) -> SetupReport:
        """What the driver needs to know of this worker's run."""
        rank, parts = self.strategy.ranks.rank, self.strategy.share.count
        return SetupReport(rank=rank, has_validation=self.data.has_validation, parts=parts, shape=self._shaped)

    def plateaus(self) -> tuple[PlateauWish, ...]:
        """The schedulers that wait for a metric; in manual optimization the user steps them."""
        return tuple(
            PlateauWish(i, type(c.scheduler).__name__, str(c.monitor), c.interval, c.frequency, c.strict)
            for i, c in enumerate(self.view.lr_scheduler_configs)
            if c.on_metric and self.module.automatic_optimization
        )

    def _attach(self, view: TrainerView | None) -> None:
        """Give the module, and Modules inside it, their `trainer`, and callbacks the module."""
        for part in self.module.modules():
            if isinstance(part, Module):
                part.__dict__["_view"] = view
        for callback in self.task.callbacks:
            callback.__dict__.pop("_beside", None)
            if view is not None:
                callback.__dict__["_beside"] = weakref.ref(self.module)

    def step(self, name: str, loaders: int) -> Callable[[Any, int, int], Any]:
        """A step of the module, bound: by its signature, in the precision's context, known to `self.log`."""
        return self.in_context(self.hooks.guarded(name, bind_step(getattr(self.module, name), name, loaders)))

    def step_end(self, name: str) -> Callable[[Any], Any] | None:
        """`<name>_end` of the module, bound likewise; None if nobody wrote it."""
        end = f"{name}_end"
        if not overridden(self.module, end):
            return None
        return self.in_context(self.hooks.guarded(end, getattr(self.module, end)))

    def in_context(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, in the precision's context."""
        if self.precision.plain:
            return function

        def within(*args: Any) -> Any:
            with self.precision.context():
                return function(*args)

        return within

    def mark(self) -> Callable[[], None]:
        """A point in the device's work: call what this returns to wait for it."""
        if self.strategy.device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        wait: Callable[[], None] = event.synchronize
        return wait

    def profiled(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, watched by the profiler if there is one."""
        return function if self.profiler is None else self.profiler.wrap(name, function)

    def after_batch(self, hook: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """What to call after each batch of what the run is about: `hook`, then the profiler's step."""
        profiler = self.profiler
        if profiler is None:
            return hook

        def after(*args: Any) -> None:
            if hook is not None:
                hook(*args)
            profiler.step()

        return after

    # ---------------------------------------------------------------- metrics and end

    def compute_metrics(self, specs: Sequence[MetricSpec], epoch_ended: bool) -> dict[str, float]:
        """Values of metric objects over all workers, on rank 0; they stay as they are until the training epoch ends."""
        values: dict[str, float] = {}
        metrics = [self.module.get_submodule(str(spec.metric)) for spec in specs]
        shares = self.strategy.ranks.world_size > 1  # else nobody needs a copy of the states
        own = [
            states_of(m) if shares and self.view.metrics.counts(s) else {} for m, s in zip(metrics, specs, strict=True)
        ]
        by_worker = self.strategy.gather_objects(own) if specs else None
        if by_worker is not None:
            for index, (metric, spec) in enumerate(zip(metrics, specs, strict=True)):
                values[spec.name] = compute(metric, [states[index] for states in by_worker], spec.name)
        if epoch_ended:
            self.view.metrics.reset_objects()
        return values

    def resume_generators(self) -> None:
        """Put the generators where a checkpoint left them, once, right before training goes on."""
        if self.rng is not None:
            restore_rng(self.rng)
            self.rng = None

    def go_on(self) -> None:
        """The hooks that begin a run have been called anew after a loss: training goes on, with what it had changed."""
        put_back, self.put_back = self.put_back, lambda: None
        put_back()

    def finish(self) -> bytes | None:
        """Stop the profiler, and tear down; what it has recorded."""
        ending, profile = Ending(), None
        if self.profiler is not None:
            with ending.step("stopping the profiler"):
                profile = self.profiler.stop()
        with ending.step("teardown"):
            self.teardown()
        ending.tell()
        return profile

    def teardown(self) -> None:
        """Run the last hooks and leave the process as it was found; each, whatever the others raise."""
        ending = Ending()
        if self.datamodule is not None:
            with ending.step("the DataModule's teardown"):
                self.datamodule.teardown(self.task.stage)
        with ending.step("teardown"):
            self.hooks.call("teardown", self.task.stage)
        with ending.step("undoing the run"):
            self.release()
        ending.tell()

    def release(self) -> None:
        """Undo what the run changed in this process, also after a failure; each change, whatever the others raise."""
        ending = Ending()
        if self.profiler is not None:
            with ending.step("stopping the profiler"):
                self.profiler.stop()
        undos = (self.data.close, self.view.metrics.close, self._undo_flags, self._leave_place, self._undo_compile)
        for undo in (*undos, self.precision.restore_module):
            with ending.step("undoing the run"):
                undo()
        self._attach(None)
        if self.datamodule is not None:
            self.datamodule.trainer = None
        ending.tell()
