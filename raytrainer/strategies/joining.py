"""What DDP wraps: a training step after which every rank takes part in averaging, whatever its step returned.

DDP averages when each parameter's gradient has come, so a rank without a loss would keep all others waiting. Its
backward pass is made up for here, of zeros; and a *vote* is averaged along with the gradients, one more number: above 0
from each rank that has a loss. Where the mean is 0, nobody had one, and gradients are to be absent, as in one process:
an optimizer that is given zeros moves weights by momentum and weight decay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raytrainer.strategies.step_result import StepResult

__all__ = ["JoinedStep", "leaves_of"]


class JoinedStep(nn.Module):
    """A step as a module, whose forward pass DDP sees from its beginning.

    Args:
        module: The user's.
        step: Of (batch, batch_idx, dataloader_idx), returning a `StepResult`.
        backwards: Have DDP number parameters from the last one.
        all_needed: Whether DDP waits for every parameter's gradient, rather than for those that the loss depends on.

    Attributes:
        vote: The parameter whose gradient is the vote.
        result: The latest step's.
        skipped: Whether it had no gradient to give.
    """

    vote: nn.Parameter
    result: StepResult
    skipped: bool

    def __init__(
        self, module: nn.Module, step: Callable[[Any, int, int], StepResult], backwards: bool, all_needed: bool
    ) -> None:
        super().__init__()
        self._sparse = _sparse_parameters(module)
        self._trained = [p for p in module.parameters() if p.requires_grad]
        dense = [p for p in self._trained if id(p) not in self._sparse]
        real = [p for p in dense if not p.is_complex()]
        last = (real or dense or self._trained)[-1]
        # of a dtype that is there already: DDP's buckets, hence its collectives, are by dtype
        vote = nn.Parameter(torch.zeros((), dtype=last.dtype, device=last.device))
        # its gradient is the first to come, so it gets a place among the last parameters, which DDP expects first.
        # DDP numbers parameters as it finds them, and looks at the module that it finds one in for sparse gradients
        if backwards:
            self.first = nn.ParameterList(
                [vote, *reversed([p for p in module.parameters() if id(p) not in self._sparse])]
            )
            self.module = module
        else:
            self.module = module
            self.last = nn.ParameterList([vote])
        self.__dict__.update(step=step, vote=vote, result=None, skipped=False)
        self._all_needed = all_needed

    def forward(self, batch: Any, batch_idx: int) -> Tensor | None:
        result: StepResult = self.__dict__["step"](batch, batch_idx, 0)
        loss = result.loss
        # a loss that is a leaf has a gradient of its own, and none for any parameter
        if loss is not None and loss.grad_fn is None and loss.requires_grad:
            loss = None
        joined: Tensor | None
        if not torch.is_grad_enabled():
            joined = None
        elif loss is None:
            others = self._trained if self._all_needed else []
            zero = self.vote.new_zeros((), dtype=torch.float32)
            joined = _Zero.apply(zero, self.vote, [id(p) in self._sparse for p in others], *others)
        else:
            # the vote is zero, and so changes nothing; its gradient is the loss's own factor (that of a scaler, say)
            vote = self.vote.real if self.vote.is_complex() else self.vote
            joined = loss + (vote if vote.dtype == loss.dtype else vote.to(loss.dtype))
        self.__dict__.update(result=result, skipped=loss is None)
        return joined

    def forget(self) -> None:
        """Hold no loss longer than its user does."""
        self.__dict__["result"] = None

    def without_gradient(self) -> list[nn.Parameter]:
        """Trained parameters that have none now."""
        return [p for p in self._trained if p.grad is None]


class _Zero(torch.autograd.Function):
    """Zero, which gives gradients of zero to the vote and to other parameters."""

    @staticmethod
    def forward(ctx: Any, zero: Tensor, vote: Tensor, sparse: list[bool], *others: Tensor) -> Tensor:
        ctx.vote, ctx.sparse, ctx.others = vote, sparse, others
        return zero.view_as(zero)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        zeros = [_sparse_zero(p) if s else torch.zeros_like(p) for p, s in zip(ctx.others, ctx.sparse, strict=True)]
        return None, torch.zeros_like(ctx.vote), None, *zeros


def _sparse_zero(parameter: Tensor) -> Tensor:
    """A gradient without any row, as an embedding's."""
    indices = torch.empty((1, 0), dtype=torch.int64, device=parameter.device)
    values = parameter.new_empty((0, *parameter.shape[1:]))
    return torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False)


def _sparse_parameters(module: nn.Module) -> set[int]:
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
