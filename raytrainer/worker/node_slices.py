"""`Slices`: where the workers of a node split its batches (ddp2, dp), what that means for steps and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raytrainer.data.slicing import cut_batch, join_parts, rows_of, span_of
from raytrainer.metrics.metric_store import MetricStore
from raytrainer.strategies.strategy import NOTHING, Strategy

__all__ = ["Slices"]

Step = Callable[[Any, int, int], Any]


class Slices:
    """Takes this worker's slice of each batch, and makes one output of those of the node's workers.

    With a strategy that splits no batch, everything stays as it is.

    A batch with fewer samples than workers leaves some without: they skip the step, and take part in what follows with
    nothing. Slices differ by at most one sample, so then no slice has more than one.

    Attributes:
        rows: Samples in this worker's slice of the latest batch; at least 1 where batches are not split.
    """

    def __init__(self, strategy: Strategy, metrics: MetricStore) -> None:
        self.strategy, self.metrics = strategy, metrics
        self.active = strategy.split.count > 1
        self.rows = 1
        self._total = 1
        metrics.twin = not strategy.counts and not self.active
        metrics.first_of_node = strategy.counts and (not self.active or strategy.split.index == 0)

    def take(self, batch: Any) -> Any:
        """This worker's slice of a batch as it comes from the loader.

        Raises:
            DataError: It cannot be split.

        A batch that is None is one without samples.
        """
        if not self.active:
            return batch
        if batch is None:  # for all workers of the node
            self.rows = 0
            return None
        split = self.strategy.split
        self._total = rows_of(batch)
        begin, end = span_of(self._total, split.index, split.count)
        self.rows = end - begin
        return cut_batch(batch, begin, end, self._total)

    def part_of(self, samples: list[Any] | None) -> list[Any] | None:
        """This worker's part of what is said of the samples of the latest batch, one by one."""
        if not self.active or samples is None:
            return samples
        begin, end = span_of(self._total, self.strategy.split.index, self.strategy.split.count)
        return samples[begin:end] if len(samples) == self._total else None

    def bind(self, step: Step, step_end: Callable[[Any], Any] | None) -> Step:
        """`step` on slices, then `step_end`, if any, on what the node's workers made of its whole batch."""
        if not self.active:
            if step_end is None:
                return step
            end = step_end
            return lambda batch, batch_idx, loader_idx: end(step(batch, batch_idx, loader_idx))
        if step_end is None:
            return lambda batch, batch_idx, loader_idx: (
                self._weighted(step(batch, batch_idx, loader_idx)) if self.rows else None
            )
        end = step_end

        def whole(batch: Any, batch_idx: int, loader_idx: int) -> Any:
            if batch is None:
                return None
            output = step(batch, batch_idx, loader_idx) if self.rows else NOTHING
            parts = self.strategy.gather(output)
            if all(part is None for part in parts):
                return None
            with self.metrics.whole_node(self._total):
                return end(join_parts(parts))

        return whole

    @property
    def weight(self) -> float:
        """That of its loss of the latest slice in the mean over workers."""
        return self.strategy.split.count * self.rows / self._total

    def _weighted(self, output: Any) -> Any:
        """The output, its loss's gradient weighted so that DDP's mean over workers is the mean over nodes.

        See `strategies/node_strategy.py`: the weight is workers x samples in the slice / samples in the batch. The
        value stays.
        """
        weight = self.weight
        if weight == 1.0 or not torch.is_grad_enabled():
            return output
        if isinstance(output, Tensor):
            return _WeightedGradient.apply(output, weight)
        if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": _WeightedGradient.apply(output["loss"], weight)}
        return output


class _WeightedGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.weight, None
