"""The training loop of one worker: chunks of batches, each a step or part of one.

In pseudocode, hooks aside:

    for batch in chunk:
        batch to the device
        loss = training_step(batch); zero gradients; backward
        on stepping batches: clip; optimizer step; schedulers that count steps
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from raytrainer.data.loaders import LookAhead
from raytrainer.errors import ConfigurationError
from raytrainer.messages import MetricReport, TrainReport, TrainStart
from raytrainer.plan.schedule import Past
from raytrainer.seeding import rng_untouched
from raytrainer.worker.hook_calls import overridden
from raytrainer.worker.precision import ScaledOptimizer

if TYPE_CHECKING:
    from raytrainer.worker.worker_run import AnyFeed, Run

__all__ = ["TrainingLoop"]


class TrainingLoop:
    """Trains on what the driver asks for; `batch` and `epoch` are the data cursor."""

    def __init__(self, run: Run) -> None:
        self.run, self.view, self.metrics = run, run.view, run.view.metrics
        run.recorder.training = self
        feeds = run.feeds("train")
        if len(feeds) != 1:
            raise ConfigurationError(
                f"{len(feeds)} training loaders: return one loader from train_dataloader(); join datasets with "
                f"torch.utils.data.ConcatDataset or StackDataset."
            )
        self.feed: AnyFeed = feeds[0]
        self.epoch = 0
        self.batch = 0
        self._iterator: Iterator[Any] | None = None
        self._run_batch = self._bind_optimization()
        bind = run.hooks.bind
        self._on_batch_start = bind("on_train_batch_start")
        self._on_batch_end = run.after_batch(bind("on_train_batch_end"))
        self._scheduler_step = run.hooks.guarded("lr_scheduler_step", run.module.lr_scheduler_step)
        self._epoch_scheduled = False
        self.view.forward_epoch = self.forward_epoch
        self._longest = 0  # batches of the longest epoch so far
        self._before = False  # groups of other sizes have done part of the epoch
        self._idle = False  # has had no sample in this epoch, since batches had fewer than the node has workers

    def _bind_optimization(self) -> _Automatic | _Manual:
        run, module = self.run, self.run.module
        self._trained = _trained(module)
        step = run.slices.bind(run.step("training_step", 1), run.step_end("training_step"))
        step = run.strategy.prepare(module, step)
        if module.automatic_optimization:
            return _Automatic(run, step)
        return _Manual(run, step)

    def describe(self) -> TrainStart:
        run = self.run
        validates = run.has_validation and run.task.settings.limit_val_batches != 0
        return TrainStart(
            batches=self.feed.length,
            batch_size=getattr(self.feed.source, "batch_size", None),
            val_batches=[feed.length for feed in run.feeds("val")] if validates else [],
        )

    def start_epoch(self, epoch: int, skip: int = 0, before: Past = ()) -> TrainStart:
        """Begin `epoch` at this worker's batch `skip`; build the loader anew where the settings ask for that.

        `before` is what groups of other sizes have done of it.
        """
        self.view.current_epoch = self.epoch = epoch
        every = self.view.settings.reload_dataloaders_every_n_epochs
        if every and epoch and epoch % every == 0 and skip == 0:
            self.feed = self.run.feeds("train", reload=True)[0]
            if self.run.has_validation:
                self.run.feeds("val", reload=True)
        self.batch = skip
        self._epoch_scheduled = False
        self._idle = self.run.slices.active
        self.view.running = "train"
        self._iterator = None
        self._before = bool(before)
        self.feed.rebase(before)
        if skip == 0:
            self.run.resume_generators()
        self.run.hooks.call("on_train_epoch_start")
        self.run.resume_generators()
        self._run_batch.accumulate = self.view.accumulate_grad_batches
        self._prepare_again()
        return self.describe()

    def _prepare_again(self) -> None:
        """Where parameters have been frozen or unfrozen since, have the strategy synchronise those that train now."""
        trained = _trained(self.run.module)
        if trained != self._trained and self.run.module.automatic_optimization:
            self._run_batch = self._bind_optimization()

    def forward_epoch(self) -> None:
        """See `TrainerView.forward_epoch`."""
        run = self.run
        step = run.slices.bind(run.step("training_step", 1), run.step_end("training_step"))
        agree = run.strategy.all_agree if run.strategy.ranks.world_size > 1 else None
        self.feed.rebase(())
        # a loader may go on for ever, in epochs that other limits have ended
        length = self._longest or self.feed.length
        batches = itertools.islice(self.feed.start(self.epoch, 0, agree), length)
        kept, run.recorder.keeps = run.recorder.keeps, False
        try:
            with torch.no_grad():
                for index, batch in enumerate(batches):
                    batch = run.slices.take(batch)
                    if run.transfer is not None:
                        batch = run.transfer(batch, 0)
                    self.metrics.begin_batch(batch)
                    step(batch, index, 0)
        finally:
            run.recorder.keeps = kept
        self.metrics.begin_batch(None)
        self.metrics.clear()

    def _batches(self) -> Iterator[Any]:
        if self._iterator is None:
            strategy = self.run.strategy
            agree = strategy.all_agree if strategy.ranks.world_size > 1 else None
            # going on within an epoch: what a loader that cannot skip reads again has been drawn before
            with rng_untouched() if self.batch else nullcontext():
                self._iterator = self.feed.start(self.epoch, self.batch, agree)
        return self._iterator

    def train(self, batches: int, stop_at_step: int | None = None, more: bool = False) -> TrainReport:
        """Train at most `batches` batches, ending early at an optimizer step or at the loader's end.

        With `more`, others follow at once, and a GPU must not run out of work in between: what the last batch logs is
        left for the next report, so that this one waits for all batches but that.
        """
        clock = time.perf_counter
        start = clock()
        run, view, metrics, transfer = self.run, self.view, self.metrics, self.run.transfer
        slices = run.slices
        view.running = "train"
        iterator, length = self._batches(), self.feed.length
        look_ahead = iterator if isinstance(iterator, LookAhead) else None
        next_batch = run.profiled("next_batch", iterator.__next__)
        accumulate = view.accumulate_grad_batches
        first, exhausted, behind, waited = self.batch, False, False, clock() - start
        for left in range(batches, 0, -1):
            asked = clock()
            try:
                batch = next_batch()
            except StopIteration:
                if self.batch == 0 and not self._before and (look_ahead is None or look_ahead.ended):
                    self.feed.refuse_nothing(self.epoch)
                exhausted = True
                break
            waited += clock() - asked
            index = self.batch
            if slices.active:
                batch = slices.take(batch)
                self._idle = self._idle and not slices.rows
            if transfer is not None:
                batch = transfer(batch, 0)
            if left == 1 and more and run.ahead:
                metrics.begin_report()
                behind = True
            metrics.begin_batch(batch)
            if self._on_batch_start is not None and self._on_batch_start(batch, index) == -1:
                exhausted = True
                break
            last = index + 1 == length or (look_ahead is not None and look_ahead.is_last)
            stepping = last or accumulate == 1 or (index + 1) % accumulate == 0
            outputs = self._run_batch(batch, index, stepping)
            if stepping and view.lr_scheduler_configs:
                self._step_schedulers()
                if last:
                    self.step_epoch_schedulers()
            if self._on_batch_end is not None:
                self._on_batch_end(_visible(outputs), batch, index)
            self.batch = index + 1
            if stepping:
                if metrics.is_log_step(run.stepped):
                    metrics.note_row(run.stepped, self.epoch)
                    if view.samplers:
                        metrics.note_samples(run.stepped, self.epoch, view.samplers)
                run.stepped += 1
            if look_ahead is not None and last:
                exhausted = True
                break
            if stop_at_step is not None and view.global_step >= stop_at_step:
                behind = False
                break
        self._longest = max(self._longest, self.batch)
        metrics.begin_batch(None)
        behind = behind and not exhausted
        report = metrics.finish_report() if behind else metrics.report()
        return TrainReport(
            batches=self.batch - first,
            batch=self.batch,
            step=view.global_step,
            seconds=clock() - start,
            exhausted=exhausted,
            stop=view.should_stop,
            data_seconds=waited,
            metrics=report,
            skipped_steps=view.skipped_steps,
            behind=behind,
        )

    def _step_schedulers(self) -> None:
        """Step the schedulers that count steps. In manual optimization the user steps them."""
        if not self.run.module.automatic_optimization:
            return
        due = [c for c in self.view.lr_scheduler_configs if c.interval == "step" and not c.on_metric]
        scaled = self.run.precision.scaler is not None
        if not due or (scaled and self.run.precision.skipped):
            return
        done = self.run.stepped + 1 - (self.run.precision.skipped_steps if scaled else 0)
        for config in due:
            if done % config.frequency == 0:
                self._scheduler_step(config.scheduler, None)

    def step_epoch_schedulers(self) -> None:
        """Step the schedulers that count epochs, once an epoch: with its last batch, or when it proves to be over."""
        if self._epoch_scheduled or not self.run.module.automatic_optimization:
            return
        self._epoch_scheduled = True
        for config in self.view.lr_scheduler_configs:
            if config.interval == "epoch" and not config.on_metric and (self.epoch + 1) % config.frequency == 0:
                self._scheduler_step(config.scheduler, None)

    def end_epoch(self) -> MetricReport:
        """Run the module's hook; report the epoch's metrics."""
        self._iterator = None
        self.run.take_metrics(self.metrics.local_values())
        self.run.hooks.call("on_train_epoch_end")
        self.view.running = None
        report = self.metrics.report(end_of_epoch=True)
        report.idle = self._idle
        return report


class _Automatic:
    """A batch with automatic optimization: forward, backward and, on stepping batches, the optimizer's step."""

    def __init__(self, run: Run, step: Callable[[Any, int, int], Any]) -> None:
        self.run, self.view, self.module, self.step = run, run.view, run.module, step
        settings = run.view.settings
        self.accumulate, self.accumulates = run.view.accumulate_grad_batches, settings.accumulates
        self.strategy, self.precision = run.strategy, run.precision
        if len(run.view.optimizers) > 1:
            raise ConfigurationError(
                f"configure_optimizers returned {len(run.view.optimizers)} optimizers: with automatic optimization "
                f"there is one. Set self.automatic_optimization = False in __init__ and step them in training_step."
            )
        self.optimizer: Optimizer | None = run.view.optimizers[0] if run.view.optimizers else None
        bind, module = run.hooks.bind, run.module
        self.on_before_zero_grad = bind("on_before_zero_grad")
        self.on_before_backward = bind("on_before_backward")
        self.on_after_backward = bind("on_after_backward")
        self.on_before_optimizer_step = bind("on_before_optimizer_step")
        self.zero_grad = _own(run, "optimizer_zero_grad")
        self.backward = _own(run, "backward")
        self.step_optimizer = run.profiled("optimizer_step", self.precision.step)
        if self.backward is None and run.profiler is not None:
            self.backward = run.profiled("backward", lambda loss: loss.backward())
        self.clip = _own(run, "configure_gradient_clipping")
        if self.clip is None and settings.gradient_clip_val is not None:
            self.clip = module.configure_gradient_clipping
        self.clipping = settings.gradient_clip_val, settings.gradient_clip_algorithm
        # the user's own optimizer_step, or an optimizer such as LBFGS that evaluates several times, gets a closure
        self.optimizer_step = _own(run, "optimizer_step")
        closing = self.optimizer is not None and _needs_closure(self.optimizer)
        if self.optimizer_step is None and closing:
            self.optimizer_step = module.optimizer_step
        self.given: Any = self.optimizer  # what optimizer_step is given
        if run.precision.scaler is not None and self.optimizer is not None:
            if closing:
                raise ConfigurationError(
                    f'precision="16-mixed" with {type(self.optimizer).__name__}: an optimizer that evaluates a closure '
                    f'several times cannot work with scaled gradients; use "bf16-mixed".'
                )
            self.given = ScaledOptimizer(self.optimizer, run.precision)
        self.batch: Any = None
        self.index = 0
        self.outputs: Any = None

    def __call__(self, batch: Any, index: int, stepping: bool) -> Any:
        self.batch, self.index = batch, index
        if self.accumulates:
            self.strategy.sync_next(stepping)
        if not stepping or self.optimizer is None:
            self._forward_backward()
        elif self.optimizer_step is not None:
            self.optimizer_step(self.view.current_epoch, index, self.given, self._closure)
        else:
            self._closure()
            self.step_optimizer(self.optimizer)
        if stepping:
            # also where infinite gradients were left out: only the device knows, and all else is counted in steps
            self.view.global_step += 1
        outputs, self.outputs, self.batch = self.outputs, None, None
        return outputs

    def _closure(self) -> Any:
        loss = self._forward_backward()
        optimizer = self.optimizer
        assert optimizer is not None
        self.precision.unscale(optimizer)
        if self.on_before_optimizer_step is not None:
            self.on_before_optimizer_step(optimizer)
        if self.clip is not None:
            self.clip(optimizer, *self.clipping)
        return loss

    def _forward_backward(self) -> Tensor | None:
        outputs = self.outputs = self.step(self.batch, self.index, 0)
        loss = _loss(outputs)
        optimizer = self.optimizer
        if optimizer is not None and (self.accumulate == 1 or self.index % self.accumulate == 0):
            if self.on_before_zero_grad is not None:
                self.on_before_zero_grad(optimizer)
            if self.zero_grad is not None:
                self.zero_grad(self.view.current_epoch, self.index, optimizer)
            else:
                optimizer.zero_grad()
        if loss is None:
            return None
        if self.accumulate > 1:
            loss = loss / self.accumulate
        scaled = self.precision.scale(loss)
        if self.on_before_backward is not None:
            self.on_before_backward(scaled)
        if self.backward is not None:
            self.backward(scaled)
        else:
            scaled.backward()
        if self.on_after_backward is not None:
            self.on_after_backward()
        return loss


class _Manual:
    """A batch with manual optimization: the user's step does it all; steps are counted at the optimizers."""

    def __init__(self, run: Run, step: Callable[[Any, int, int], Any]) -> None:
        self.step = step
        self.accumulate = 1
        settings = run.view.settings
        if settings.accumulates or settings.gradient_clip_val is not None:
            raise ConfigurationError(
                "accumulate_grad_batches and gradient_clip_val do not work with manual optimization: accumulate in "
                "training_step, and call self.clip_gradients(optimizer, gradient_clip_val=...) before its step."
            )
        view, module, strategy, precision = run.view, run.module, run.strategy, run.precision
        before_step = run.hooks.bind("on_before_optimizer_step")
        before_backward, after_backward = run.hooks.bind("on_before_backward"), run.hooks.bind("on_after_backward")

        def count(optimizer: Optimizer | None, args: Any, kwargs: Any) -> None:
            view.global_step += 1

        if precision.scaler is not None:
            view.given_optimizers = [
                ScaledOptimizer(optimizer, precision, before_step, lambda: count(None, (), {}))
                for optimizer in view.optimizers
            ]
        for optimizer in view.optimizers if precision.scaler is None else []:
            if before_step is not None:
                optimizer.register_step_pre_hook(lambda o, args, kwargs: before_step(o))
            optimizer.register_step_post_hook(count)

        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss = precision.scale(loss)
            if before_backward is not None:
                before_backward(loss)
            module.backward(loss, *args, **kwargs)
            strategy.sync_manual(module)
            if after_backward is not None:
                after_backward()

        view.manual_backward = manual_backward

    def __call__(self, batch: Any, index: int, stepping: bool) -> Any:
        return self.step(batch, index, 0)


def _trained(module: torch.nn.Module) -> list[bool]:
    """Which parameters train."""
    return [parameter.requires_grad for parameter in module.parameters()]


def _own(run: Run, name: str) -> Callable[..., Any] | None:
    """The module's own version of a hook that has a default, or None."""
    return run.hooks.guarded(name, getattr(run.module, name)) if overridden(run.module, name) else None


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _loss(outputs: Any) -> Tensor | None:
    if outputs is None or isinstance(outputs, Tensor):
        return outputs
    loss = outputs.get("loss") if isinstance(outputs, dict) else None
    if isinstance(loss, Tensor):
        return loss
    raise ConfigurationError(
        f"training_step returned {type(outputs).__name__}{sorted(outputs) if isinstance(outputs, dict) else ''}: "
        f'return the loss as a tensor, a dict with a tensor under "loss", or None to skip the batch.'
    )


def _visible(outputs: Any) -> Any:
    """What `on_train_batch_end` is given: a dict whose loss is detached, or None."""
    if isinstance(outputs, Tensor):
        return {"loss": outputs.detach()}
    if isinstance(outputs, dict):
        return {k: v.detach() if k == "loss" and isinstance(v, Tensor) else v for k, v in outputs.items()}
    return outputs
