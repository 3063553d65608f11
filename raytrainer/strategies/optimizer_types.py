"""An optimizer's state taken up in the types that it was saved in."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from raytrainer.errors import CheckpointError

__all__ = ["load_optimizer_state"]


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any], as_saved: bool) -> None:
    """`load_state_dict`, which gives floating-point tensors of the state the type of their parameters.

    So moments kept in float32 for weights in bfloat16, or the float32 products that NAdam has of any weights, would be
    rounded, or be of another type than in the run that they are of.

    Args:
        optimizer: Takes it up.
        state: As saved; may be kept.
        as_saved: Parameters have the types that they had then, so that its state has too.

    Raises:
        CheckpointError: It is another optimizer's.
    """
    needed = {name for name in optimizer.defaults if all(name in group for group in optimizer.param_groups)}
    optimizer.load_state_dict(state)
    lacking = sorted({name for group in optimizer.param_groups for name in needed - group.keys()})
    if lacking:
        raise CheckpointError(
            f"the checkpoint's optimizer is another one: it has no {', '.join(lacking)}, which this "
            f"{type(optimizer).__name__} needs. Go on with that run's optimizer, or begin with its weights alone: "
            f"Module.load_from_checkpoint(...)."
        )
    if not as_saved:
        return
    saved = [index for group in state["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(saved, parameters, strict=True):
        held, entries = optimizer.state.get(parameter), state["state"].get(index)
        if not isinstance(held, dict) or not isinstance(entries, dict):
            continue
        for name, value in entries.items():
            now = held.get(name)
            cast = isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype == parameter.dtype != value.dtype
            if cast and value.is_floating_point():
                held[name] = value.to(now.device, copy=True)  # type: ignore[union-attr]
