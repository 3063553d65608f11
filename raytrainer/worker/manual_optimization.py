"""A batch with manual optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from raytrainer.errors import ConfigurationError
from raytrainer.worker.closures import Closure, takes_closure
from raytrainer.worker.given_optimizer import GivenOptimizer
from raytrainer.worker.precision import ScaledOptimizer
from raytrainer.worker.worker_run import WorkerRun

__all__ = ["ManualOptimization"]


class ManualOptimization:
    """The user's step does it all; steps are counted at the optimizers."""

    def __init__(self, run: WorkerRun, step: Callable[[Any, int, int], Any]) -> None:
        self.step, self.strategy = step, run.strategy
        self.accumulate = 1
        self.syncs = True  # whether backward passes average gradients
        self.index, self.calls = 0, 0  # of the batch in progress, and averagings in it
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
            strategy.refresh(module)

        stands: dict[str, Any] = {"module": module, "unsynchronised": self._unsynchronised}
        if precision.scaler is not None:
            view.given_optimizers = [
                ScaledOptimizer(optimizer, precision, before_step, lambda: count(None, (), {}), **stands)
                for optimizer in view.optimizers
            ]
        else:
            view.given_optimizers = []
            for optimizer in view.optimizers:
                searches = strategy.ranks.world_size > 1 and takes_closure(optimizer) is not Closure.NEVER
                own = {**stands, "common": self._common} if searches else stands
                view.given_optimizers.append(GivenOptimizer(optimizer, **own))
            for optimizer in view.optimizers:
                if before_step is not None:
                    optimizer.register_step_pre_hook(lambda o, args, kwargs: before_step(o))
                optimizer.register_step_post_hook(count)

        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss = precision.scale(loss)
            if before_backward is not None:
                before_backward(loss)
            strategy.manual_backward(module, loss, lambda loss: module.backward(loss, *args, **kwargs))
            if self.syncs:
                strategy.sync_manual(module, self.index, self.calls)
                self.calls += 1
            if after_backward is not None:
                after_backward()

        view.manual_backward = manual_backward

    def __call__(self, batch: Any, index: int, stepping: bool) -> Any:
        self.index, self.calls = index, 0
        return self.step(batch, index, 0)

    @contextmanager
    def _unsynchronised(self) -> Iterator[None]:
        outer, self.syncs = self.syncs, False
        try:
            yield
        finally:
            self.syncs = outer

    def _common(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure whose loss is the mean over workers, where its `manual_backward` has averaged gradients."""

        def common() -> Any:
            before = self.calls
            loss = closure()
            if loss is None or self.calls == before:
                return loss
            own = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss, device=self.strategy.device)
            mean = self.strategy.all_gather(own.double()).mean(0)
            return mean if isinstance(loss, Tensor) else mean.item()

        return common

    def end_chunk(self) -> None:
        """A chunk is through: see that all workers are."""
        self.strategy.end_manual(self.index)
