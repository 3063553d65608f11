"""A batch with automatic optimization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from raytrainer.errors import ConfigurationError
from raytrainer.private.torch_private import profiler_runs
from raytrainer.strategies.step_result import StepResult, loss_of, require_graph
from raytrainer.worker.accumulation_window import Window
from raytrainer.worker.closures import Closure, takes_closure
from raytrainer.worker.hook_calls import made_by, overridden
from raytrainer.worker.precision import ScaledOptimizer
from raytrainer.worker.worker_run import WorkerRun

__all__ = ["AutomaticOptimization", "forget_gradients", "is_torchs", "visible", "with_loss"]

Step = Callable[[Any, int, int], Any]


def with_loss(run: WorkerRun, step: Step) -> Callable[[Any, int, int], StepResult]:
    """`training_step`, returning its loss beside what it returned. It is not called for a batch that is None.

    It refuses losses that have no backward pass, unless the user's own `backward` may have some use for them.
    """
    own_backward = overridden(run.module, "backward")
    rank = f" of rank {run.strategy.ranks.rank}" if run.strategy.ranks.world_size > 1 else ""

    def stepped(batch: Any, batch_idx: int, dataloader_idx: int) -> StepResult:
        outputs = None if batch is None else step(batch, batch_idx, dataloader_idx)
        loss = outputs if isinstance(outputs, Tensor) else loss_of(outputs)
        if loss is not None and not own_backward:
            plain = loss.requires_grad and loss.numel() == 1 and not loss.is_complex()
            if not plain:
                require_graph(loss, f"batch {batch_idx}{rank}")
        return StepResult(loss, outputs)

    return stepped


class AutomaticOptimization:
    """Forward, backward and, on stepping batches, the optimizer's step."""

    def __init__(self, run: WorkerRun, step: Callable[[Any, int, int], StepResult]) -> None:
        self.run, self.view, self.module, self.step = run, run.view, run.module, step
        self.several = run.strategy.ranks.world_size > 1
        # whether workers have losses of their own slices of a node's batch, rather than all of the whole one
        self.weighs = run.slices.active and not overridden(run.module, "training_step_end")
        self.without_loss = 0  # calls of training_step that gave none
        self.given_any = False  # whether any worker had a loss in the latest window
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
        # of shards a gradient is there when it has been averaged: hooks would see, and change, each window's last alone
        self.averages_each = self.on_after_backward is not None and settings.sharding is not None
        self.on_before_optimizer_step = bind("on_before_optimizer_step")
        self.zero_grad = _own(run, "optimizer_zero_grad")
        self.backward = _own(run, "backward")
        # asked once: most runs have no scaler and no profiler, and a small step would notice the calls
        self.scales = run.precision.scaler is not None
        own = self.scales or run.profiler is not None
        stepped = run.profiled("optimizer_step", self.precision.step if self.scales else _step) if own else None
        self.step_optimizer: Callable[[Optimizer], None] | None = stepped
        if self.backward is None and run.profiler is not None:
            self.backward = run.profiled("backward", lambda loss: loss.backward())
        if run.precision.dtype is not None:
            # what a backward pass computes again (activation checkpointing) makes tensors of the types that it had made
            self.backward = run.in_context(self.backward or (lambda loss: loss.backward()))
        self.clip = _own(run, "configure_gradient_clipping")
        if self.clip is None and settings.gradient_clip_val is not None:
            self.clip = module.configure_gradient_clipping
        self.clipping = settings.gradient_clip_val, settings.gradient_clip_algorithm
        # the user's own optimizer_step, or an optimizer that may evaluate several times, gets a closure
        self.optimizer_step = _own(run, "optimizer_step")
        own_step = self.optimizer_step is not None
        takes = Closure.NEVER if self.optimizer is None else takes_closure(self.optimizer)
        if not own_step and takes is not Closure.NEVER:
            self.optimizer_step = module.optimizer_step
        self.given: Any = self.optimizer  # what optimizer_step is given
        if self.scales and self.optimizer is not None:
            if takes is Closure.REQUIRED:
                raise ConfigurationError(
                    f'precision="16-mixed" with {type(self.optimizer).__name__}: an optimizer that evaluates a closure '
                    f'several times cannot work with scaled gradients; use "bf16-mixed".'
                )
            self.given = ScaledOptimizer(self.optimizer, run.precision)
        self.needs_number = takes is Closure.REQUIRED  # such an optimizer computes with what its closure returns
        self.window = Window(run.view, run.recorder, several=self.needs_number)
        self.batch: Any = None
        self.index = 0
        self.syncs = True  # whether the next backward pass is the window's last
        self.outputs: Any = None

    def __call__(self, batch: Any, index: int, stepping: bool) -> Any:
        self.batch, self.index, self.syncs = batch, index, stepping
        if self.accumulates:
            self.strategy.sync_next(stepping or self.averages_each)
        if not stepping or self.optimizer is None:
            loss = self._forward_backward()
            if self.optimizer_step is not None:
                self.window.add(batch, index, self._weighted(loss))
        elif self.optimizer_step is not None:
            self.optimizer_step(self.view.current_epoch, index, self.given, self._closure)
            if self.window.end() == 0:
                raise ConfigurationError(
                    f"The closure was not called in batch {index}, so that training_step has not run: optimizer_step "
                    f"must call optimizer_closure(), or optimizer.step(closure=optimizer_closure), and "
                    f"{type(self.optimizer).__name__}.step call what it is given."
                )
        else:
            self._evaluate()
            if self.step_optimizer is None:
                self.optimizer.step()
            else:
                self.step_optimizer(self.optimizer)
        if stepping:
            # also where infinite gradients were left out: only the device knows, and all else is counted in steps
            self.view.global_step += 1
        outputs, self.outputs, self.batch = self.outputs, None, None
        return outputs

    def end_chunk(self) -> None:
        """Nothing is left to wait for."""

    @torch.enable_grad()
    def _closure(self) -> Any:
        """The window's loss and its gradients, at the weights of now; the same on all workers."""
        batch, index = self.batch, self.index
        for earlier in self.window.evaluate(index % self.accumulate):
            self.batch, self.index = earlier
            self.syncs = False
            self.strategy.sync_next(self.averages_each)
            with self.window.unheard():
                self.window.losses.append(self._weighted(self._forward_backward()))
        self.batch, self.index, self.syncs = batch, index, True
        if self.accumulates:
            self.strategy.sync_next(True)
        last = self._weighted(self._evaluate())
        if not (self.given_any or self.needs_number):
            return None
        total = self.window.total(last, self.strategy.device)
        # of one dtype on all workers, since they are to take the same decisions by it
        return self.strategy.all_gather(total.double()).mean(0) if self.several else total

    def _weighted(self, loss: Tensor | None) -> Tensor | None:
        """A worker's loss, detached, as it counts in the mean over workers."""
        if loss is None:
            return None
        return loss.detach() * self.run.slices.weight if self.weighs else loss.detach()

    def _evaluate(self) -> Tensor | None:
        """Forward and backward of the window's last batch, up to the optimizer's step."""
        loss = self._forward_backward()
        optimizer = self.optimizer
        assert optimizer is not None
        if self.scales:
            self.precision.unscale(optimizer)
        if self.on_before_optimizer_step is not None:
            self.on_before_optimizer_step(optimizer)
        if self.clip is not None:
            self.clip(optimizer, *self.clipping)
        return loss

    def _forward_backward(self) -> Tensor | None:
        loss, self.outputs, join = self.step(self.batch, self.index, 0)
        optimizer = self.optimizer
        if optimizer is not None and (self.accumulate == 1 or self.index % self.accumulate == 0):
            self.given_any = False
            if self.on_before_zero_grad is not None:
                self.on_before_zero_grad(optimizer)
            if self.zero_grad is not None:
                self.zero_grad(self.view.current_epoch, self.index, optimizer)
            else:
                forget_gradients(optimizer)
        if loss is not None:
            if self.accumulate > 1:
                loss = loss / self.accumulate
            scaled = self.precision.scale(loss) if self.scales else loss
            if self.on_before_backward is not None:
                self.on_before_backward(scaled)
            if self.backward is not None:
                self.backward(scaled)
            else:
                scaled.backward()
        if join is not None:
            self.precision.scale(torch.zeros((), device=self.strategy.device))  # as those that have a loss do
            join()
        elif loss is not None:
            self.strategy.end_backward(self.module)
        if self.several and self.syncs:
            self.given_any = self.strategy.settle(self.module, loss, self.index)
        elif loss is not None:
            self.given_any = True
        if loss is None:
            self.without_loss += 1
        elif self.on_after_backward is not None:
            self.on_after_backward()
        return loss


def is_torchs(method: Any) -> bool:
    """Whether a method is torch's own; see `made_by`."""
    return made_by("torch", method)


#: As torch has it, whatever is put in its place later; None: something has been put there already.
_ZERO_GRAD = Optimizer.zero_grad if is_torchs(Optimizer.zero_grad) else None


def forget_gradients(optimizer: Optimizer) -> None:
    """`optimizer.zero_grad()`, without the mark that torch's own sets for profilers: 4 % of a small step.

    An optimizer that has its own is asked, and so is each where a profiler runs.
    """
    own = type(optimizer).zero_grad is not _ZERO_GRAD or "zero_grad" in optimizer.__dict__
    if own or profiler_runs():
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _step(optimizer: Optimizer) -> None:
    optimizer.step()


def _own(run: WorkerRun, name: str) -> Callable[..., Any] | None:
    """The module's own version of a hook that has a default, or None."""
    return run.hooks.guarded(name, getattr(run.module, name)) if overridden(run.module, name) else None


def visible(outputs: Any, accumulate: int = 1) -> Any:
    """What `on_train_batch_end` is given of a training step's outputs: a dict, empty where there were none.

    Its loss is detached, and of automatic optimization as it went into the backward pass: divided by `accumulate`.
    """
    if outputs is None:
        return {}
    if isinstance(outputs, Tensor):
        outputs = {"loss": outputs}
    if not isinstance(outputs, Mapping) or not isinstance(loss := outputs.get("loss"), Tensor):
        return outputs
    loss = loss.detach()
    return {**outputs, "loss": loss / accumulate if accumulate > 1 else loss}
