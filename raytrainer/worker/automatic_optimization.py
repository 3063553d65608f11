"""A batch with automatic optimization."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from raytrainer.errors import ConfigurationError
from raytrainer.worker.hook_calls import overridden
from raytrainer.worker.precision import ScaledOptimizer
from raytrainer.worker.worker_run import WorkerRun

__all__ = ["AutomaticOptimization"]


class AutomaticOptimization:
    """Forward, backward and, on stepping batches, the optimizer's step."""

    def __init__(self, run: WorkerRun, step: Callable[[Any, int, int], Any]) -> None:
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


def _own(run: WorkerRun, name: str) -> Callable[..., Any] | None:
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
