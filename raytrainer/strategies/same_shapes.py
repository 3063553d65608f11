"""Workers whose modules differ in what they train, told before anything waits for what will never come."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from raytrainer.errors import DisagreementError
from raytrainer.plan.folding import by_text, ranks_text

__all__ = ["number_of", "refuse_other_shapes", "switched", "what_trains"]


def refuse_other_shapes(module: nn.Module, control: Any, buffers: bool) -> None:
    """Compare names, shapes, types, and what is frozen. All workers must call it together.

    Args:
        module: This worker's.
        control: A gloo group of all workers.
        buffers: Whether buffers are to be alike too.

    Raises:
        DisagreementError: Names the first tensor that differs, and the ranks. On all workers.
    """
    own = {name: _text(tensor) for name, tensor in module.named_parameters()}
    own |= {name: _text(tensor) for name, tensor in module.named_buffers()} if buffers else {}
    number = zlib.crc32(repr(own).encode())
    both = torch.tensor([number, -number])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=control)
    if both[0] == -both[1]:
        return
    found: list[Any] = [None] * dist.get_world_size(control)
    dist.all_gather_object(found, own, group=control)
    names = dict.fromkeys(name for each in found for name in each)
    differing = (name for name in names if len({each.get(name) for each in found}) > 1)
    name = next(differing, None)
    if name is None:
        told = "they have the same parameters in another order"
    else:
        said = by_text({rank: each.get(name, "absent") for rank, each in enumerate(found)})
        told = f"{name} is " + ", ".join(f"{text} on rank(s) [{ranks_text(on)}]" for on, text in said)
    raise DisagreementError(
        f"workers have built different modules: {told}. What setup, configure_model and configure_optimizers build, "
        f"freeze (requires_grad_) or cast must be the same on all workers."
    )


def what_trains(module: nn.Module) -> dict[str, bool]:
    """Of each parameter, whether it trains."""
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def number_of(trained: dict[str, bool]) -> int:
    """The same for the same parameters, of which the same train."""
    return zlib.crc32(repr(trained).encode())


def switched(before: dict[str, bool], now: dict[str, bool]) -> tuple[str, ...]:
    """How the first few parameters that differ do."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)][:3]
    words = {None: "is gone", False: "is frozen", True: "trains"}
    return tuple(f"{name} {words[now.get(name)] if name in before else 'is new'}" for name in names)


def _text(tensor: Tensor) -> str:
    shape = "lazy" if is_lazy(tensor) else f"of shape {tuple(tensor.shape)}"
    kind = str(tensor.dtype).removeprefix("torch.")
    frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    return f"{'frozen, ' if frozen else ''}{shape} in {kind}"
