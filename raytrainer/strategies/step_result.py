"""What a training step of automatic optimization comes to, on its way through the strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from raytrainer.errors import ConfigurationError

__all__ = ["StepResult", "loss_of", "require_graph"]


class StepResult(NamedTuple):
    """What `Strategy.prepare`'s step returns where the loop, rather than the user's code, runs the backward pass.

    Attributes:
        loss: What to backpropagate; None: this worker skips the batch.
        outputs: What `training_step` returned.
        join: Where this worker has no gradient to give and others may have one: to be called in place of (or after)
            the backward pass, so that nobody waits for it.
    """

    loss: Tensor | None
    outputs: Any
    join: Callable[[], None] | None = None


def loss_of(outputs: Any) -> Tensor | None:
    """The loss in what `training_step` returned; None: skip the batch.

    Raises:
        ConfigurationError: There is none.
    """
    if outputs is None or isinstance(outputs, Tensor):
        return outputs
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if isinstance(loss, Tensor):
        return loss
    raise ConfigurationError(
        f"training_step returned {type(outputs).__name__}{sorted(outputs) if isinstance(outputs, Mapping) else ''}: "
        f'return the loss as a tensor, a dict with a tensor under "loss", or None to skip the batch.'
    )


def require_graph(loss: Tensor, where: str) -> None:
    """Refuse what torch cannot backpropagate, before it is tried.

    Args:
        loss: Of a step.
        where: E.g. "batch 3 of rank 1".

    Raises:
        ConfigurationError: It has several elements, is complex, or depends on nothing that requires a gradient.
    """
    if loss.numel() != 1 or loss.is_complex():
        kind = "complex" if loss.is_complex() else f"of shape {tuple(loss.shape)}"
        raise ConfigurationError(
            f"training_step returned a loss {kind} in {where}: it must be one real number; take its mean(), or abs()."
        )
    if not loss.requires_grad:
        raise ConfigurationError(
            f"training_step returned a loss without a graph in {where}: nothing that it was computed from requires a "
            f"gradient (it was detached, made under torch.no_grad(), or is a constant; or all parameters are frozen; "
            f"its type is {loss.dtype}). Return one that depends on the parameters, or None to skip the batch."
        )
