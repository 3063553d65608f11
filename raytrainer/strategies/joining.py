"""What DDP wraps: a training step after which every rank takes part in averaging, whatever its step returned.

DDP averages when each parameter's gradient has come, so a rank without a loss would keep all others waiting. Its
backward pass is made up for here, of zeros. Where nobody had a loss, gradients are to be absent, as in one process: an
optimizer that is given zeros moves weights by momentum and weight decay. So whoever has none counts itself in the
group's store before it takes part, and looks at the count afterwards. Nobody can have come through the averaging before
all have begun theirs, so the count is whole by then; and ranks with a loss have nothing to do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raytrainer.strategies.step_result import StepResult

__all__ = ["Absentees", "JoinedStep", "Reached", "leaves_of", "sparse_parameters"]


class Absentees:
    """Counts the workers that have no gradient to give, window by window.

    Args:
        store: That all workers share.
        control: Their gloo group. All make this together.
        world_size: How many they are.

    Attributes:
        counted: Whether this worker is one of them in the window in progress.
    """

    def __init__(self, store: Any, control: Any, world_size: int) -> None:
        name = [uuid4().hex]
        dist.broadcast_object_list(name, src=0, group=control)  # what the store has of earlier runs stays theirs
        self._store, self._name, self._size = store, f"raytrainer/absent/{name[0]}", world_size
        self._window = 0
        self.counted = False
        self._kept: list[int] = []  # windows whose counts are still in the store

    def count(self) -> None:
        """This worker is one of them. To be called before it takes part in averaging."""
        for window in [w for w in self._kept if w < self._window - 1]:  # all have looked at these
            self._store.delete_key(f"{self._name}/{window}")
            self._kept.remove(window)
        self._store.add(f"{self._name}/{self._window}", 1)
        self._kept.append(self._window)
        self.counted = True

    def are_all(self) -> bool:
        """Whether nobody had a gradient to give. To be called once averaging is done, on the device too."""
        return bool(self._store.add(f"{self._name}/{self._window}", 0) == self._size)

    def next_window(self) -> None:
        self._window += 1
        self.counted = False


class JoinedStep(nn.Module):
    """A step as a module, whose forward pass DDP sees from its beginning.

    Args:
        module: The user's.
        step: Of (batch, batch_idx, dataloader_idx), returning a `StepResult`.
        backwards: Have DDP number parameters from the last one.
        all_needed: Whether DDP waits for every parameter's gradient, rather than for those that the loss depends on.

    Attributes:
        result: The latest step's.
        skipped: Whether it had no gradient to give.
    """

    result: StepResult
    skipped: bool
    anchor: nn.Parameter | None

    def __init__(
        self, module: nn.Module, step: Callable[[Any, int, int], StepResult], backwards: bool, all_needed: bool
    ) -> None:
        super().__init__()
        sparse = sparse_parameters(module)
        self._trained = [p for p in module.parameters() if p.requires_grad]
        # DDP numbers parameters as it finds them, and looks at the module that it finds one in for sparse gradients
        if backwards:
            self.first = nn.ParameterList(reversed([p for p in module.parameters() if id(p) not in sparse]))
        self.module = module
        joins = self._trained
        if all_needed:
            self.__dict__["anchor"] = None
        else:
            # every loss depends on it, also that of a worker without a real one: DDP averages once any gradient comes
            real = [p for p in self._trained if not p.is_complex()]
            dtype = real[-1].dtype if real else torch.float32  # DDP's buckets, hence its collectives, are by dtype
            self.anchor = nn.Parameter(torch.zeros((), dtype=dtype, device=self._trained[-1].device))
            joins = [self.anchor]
        self.__dict__.update(step=step, result=None, skipped=False)
        self._joins, self._sparse = joins, [id(p) in sparse for p in joins]

    def forward(self, batch: Any, batch_idx: int) -> Tensor | None:
        own = self.__dict__
        result: StepResult = own["step"](batch, batch_idx, 0)
        loss = result.loss
        # a loss that is a leaf has a gradient of its own, and none for any parameter
        if loss is not None and loss.is_leaf and loss.requires_grad:
            loss = None
        own["result"], own["skipped"] = result, loss is None
        if not torch.is_grad_enabled():
            return None
        if loss is None:
            zero = self._trained[0].new_zeros((), dtype=torch.float32)
            joined: Tensor = _Zero.apply(zero, self._sparse, *self._joins)
            return joined
        # the anchor is zero, and so changes nothing
        return loss if self.anchor is None else loss + self.anchor.to(loss.dtype)

    def forget(self) -> None:
        """Hold no loss longer than its user does."""
        self.__dict__["result"] = None

    def without_gradient(self) -> list[nn.Parameter]:
        """Trained parameters that have none now."""
        return [p for p in self._trained if p.grad is None]


class Reached:
    """Tells whether a backward pass has come to a parameter, for DDP says nothing where it has come to none.

    Args:
        parameter: One that every loss is to depend on.

    Attributes:
        seen: The parameter, as often as backward passes have come to it since this was emptied.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.seen: list[Tensor] = []  # which the parameter holds, and so nothing else of the run
        # a parameter that is held by what it holds would never be freed
        weakref.finalize(self, self.seen.clear)
        # no function of Python's, which would take a step's time for a hundredth of small ones
        self._handle = parameter.register_post_accumulate_grad_hook(self.seen.append)

    def close(self) -> None:
        self._handle.remove()
        self.seen.clear()


class _Zero(torch.autograd.Function):
    """Zero, which gives gradients of zero to parameters."""

    @staticmethod
    def forward(ctx: Any, zero: Tensor, sparse: list[bool], *joins: Tensor) -> Tensor:
        ctx.sparse, ctx.joins = sparse, joins
        return zero.view_as(zero)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        zeros = [_sparse_zero(p) if s else torch.zeros_like(p) for p, s in zip(ctx.joins, ctx.sparse, strict=True)]
        return None, None, *zeros


def _sparse_zero(parameter: Tensor) -> Tensor:
    """A gradient without any row, as an embedding's."""
    indices = torch.empty((1, 0), dtype=torch.int64, device=parameter.device)
    values = parameter.new_empty((0, *parameter.shape[1:]))
    return torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False)


def sparse_parameters(module: nn.Module) -> set[int]:
    """Ids of the parameters whose gradients are sparse: those that DDP takes for such."""
    return {
        id(part.weight)
        for part in module.modules()
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse
    }


def leaves_of(loss: Tensor) -> set[int]:
    """Ids of the tensors that a loss was computed from and gives gradients to. Also after its backward pass."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        waiting += [following for following, _ in node.next_functions]
    return found
