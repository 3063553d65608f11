"""Workers that begin with the same module: what they have built or changed themselves is rank 0's, as with DDP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raytrainer.errors import DisagreementError
from raytrainer.strategies.group_strategy import take_from_first

__all__ = ["SameStart"]


class SameStart:
    """Remembers a module as it was sent, which all workers have alike; see `share`."""

    def __init__(self, module: nn.Module) -> None:
        self._sent = {name: (tensor, tensor._version) for name, tensor in _plain(module)}

    @torch.no_grad()
    def share(self, module: nn.Module, device: torch.device, control: Any) -> None:
        """Give every worker rank 0's values of what any of them has made or changed since. All must call it together.

        Args:
            module: The same one, later.
            device: Where collectives work.
            control: A gloo group of all workers.

        Raises:
            DisagreementError: Workers have built different modules.
        """
        if dist.get_world_size() == 1:
            return
        tensors = dict(_plain(module))
        changed = {name: tuple(tensor.shape) for name, tensor in tensors.items() if self._is_new(name, tensor)}
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, changed, group=control)
        shapes: dict[str, Any] = {name: shape for each in found for name, shape in each.items()}
        here = {name: tuple(tensors[name].shape) if name in tensors else None for name in shapes}
        dist.all_gather_object(found, here, group=control)
        for name in shapes:
            if len({each[name] for each in found}) > 1:
                told = ", ".join(f"rank {rank}: {each[name] or 'none'}" for rank, each in enumerate(found))
                raise DisagreementError(
                    f"workers have built different modules: shapes of {name!r} are {told}. setup() and "
                    f"configure_model() must build the same on all workers."
                )
        for name in sorted(shapes):
            own = tensors[name].data
            value = own.to(device)
            take_from_first([value])
            if value is not own:
                own.copy_(value)

    def _is_new(self, name: str, tensor: Tensor) -> bool:
        sent = self._sent.get(name)
        return sent is None or sent[0] is not tensor or sent[1] != tensor._version


def _plain(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not tensor.is_meta and not isinstance(tensor, DTensor) and not nn.parameter.is_lazy(tensor):
            yield name, tensor
