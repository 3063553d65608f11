"""The state of a module in shards: what each worker gives of it, and takes up."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from raytrainer.checkpointing.parallel_reads import read_all
from raytrainer.checkpointing.pieces import InPieces, join_pieces
from raytrainer.data.transfer import to_cpu
from raytrainer.errors import CheckpointError
from raytrainer.private.fsdp_private import accumulated_gradients, put_accumulated_gradients
from raytrainer.strategies.broken_ties import ties_kept
from raytrainer.strategies.gatherings import Gatherings
from raytrainer.strategies.group_strategy import GroupStrategy
from raytrainer.strategies.shards import copied_along, held_as, in_pieces, local_part, piece_held

__all__ = ["ShardedState"]

#: Before names of parameters: of gradients that have been averaged.
_AVERAGED = "averaged/"


class ShardedState(GroupStrategy):
    """A strategy whose workers hold shards. No collective is needed to take a state, nor to take one up."""

    _gatherings: Gatherings | None = None

    @property
    def gatherings(self) -> Gatherings:
        assert self._gatherings is not None
        return self._gatherings

    def building(self, module: nn.Module) -> AbstractContextManager[None]:
        return ties_kept(module)

    def refresh(self, module: nn.Module) -> None:
        """Have the shards be what the module's names stand for."""
        self.gatherings.reshard()

    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        self.gatherings.together("all_gather")
        return super().all_gather(tensor, sync_grads)

    def replicas(self, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What other workers hold too: a module of which there are several copies, or that is split in part."""
        self.refresh(module)
        held = {n: local_part(p).detach() for n, p in module.named_parameters() if copied_along(p, self.device_mesh)}
        return held, {name: buffer for name, buffer in module.named_buffers() if not isinstance(buffer, DTensor)}

    def pieces(self, module: nn.Module) -> dict[str, str]:
        return {name: piece_held(parameter) for name, parameter in module.named_parameters()}

    def of_first(self, module: nn.Module, name: str, part: Tensor) -> Tensor:
        parameter = dict(module.named_parameters()).get(name)
        along = range(self.device_mesh.ndim) if parameter is None else copied_along(parameter, self.device_mesh)
        first = part.detach().to(self.device, copy=True)
        for dimension in along:
            group = self.device_mesh.get_group(dimension)
            dist.broadcast(first, src=dist.get_global_rank(group, 0), group=group)
        return first.to(part.device)

    def holds_common(self, replica: bool) -> bool:
        return True  # its pieces

    def own_part(self, state: dict[str, Any], replica: bool) -> dict[str, Any]:
        return in_pieces(state, super().holds_common(replica))

    def take_up(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return join_pieces(state, lambda tensor: tensor)

    def local_part(self, tensor: Tensor) -> Tensor:
        return local_part(tensor)

    def as_held(self, value: Any, like: Tensor) -> Tensor:
        return held_as(value, like)

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        self.refresh(module)
        return super().module_state(module)

    def load_module(self, module: nn.Module, state: Mapping[str, Any], strict: bool) -> None:
        self.refresh(module)
        own = module.state_dict()
        wrong = [
            f"{name}: {tuple(value.shape)} in the checkpoint, {tuple(own[name].shape)} here"
            for name, value in state.items()
            if isinstance(own.get(name), Tensor) and hasattr(value, "shape") and value.shape != own[name].shape
        ]
        if wrong:
            raise CheckpointError(
                f"the checkpoint's weights do not fit {type(module).__name__}: {'; '.join(wrong)}. Construct the "
                f"module as it was when saved."
            )
        held = read_all({name: partial(self._held, value, own.get(name)) for name, value in state.items()})
        super().load_module(module, held, strict)

    def _held(self, value: Any, like: Any) -> Any:
        if isinstance(like, Tensor) and isinstance(value, (Tensor, InPieces)):
            return held_as(value, like)
        return value.whole() if isinstance(value, InPieces) else value

    def load_optimizer(self, module: nn.Module, optimizer: Optimizer, state: dict[str, Any], as_saved: bool) -> None:
        self.refresh(module)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def held(value: Any, parameter: Tensor) -> Any:
            if isinstance(value, (Tensor, InPieces)) and value.shape == parameter.shape and value.shape != ():
                return held_as(value, parameter)
            return value.whole() if isinstance(value, InPieces) else value

        values = dict(state["state"])
        fits = {
            index: entries
            for index, entries in values.items()
            if isinstance(index, int) and index < len(parameters) and isinstance(entries, dict)
        }
        reads = {
            (index, name): partial(held, value, parameters[index])
            for index, entries in fits.items()
            for name, value in entries.items()
        }
        values |= {index: {} for index in fits}
        for (index, name), value in read_all(reads).items():
            values[index][name] = value
        super().load_optimizer(module, optimizer, {**state, "state": values}, as_saved)

    def averaged_tensors(self, module: nn.Module, buffers: bool) -> dict[str, Tensor]:
        self.refresh(module)
        return super().averaged_tensors(module, buffers)

    def accumulated(self, module: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.gatherings.modules:
            found |= accumulated_gradients(part)
        # where hooks have had them averaged after each batch, they are in shards
        shards = {name: p.grad for name, p in module.named_parameters() if isinstance(p.grad, DTensor)}
        return found | {f"{_AVERAGED}{name}": gradient.to_local().detach() for name, gradient in shards.items()}

    def put_accumulated(self, module: nn.Module, gradients: Mapping[str, Tensor]) -> None:
        if not gradients:
            return
        for part in self.gatherings.modules:
            part.unshard()
            part.reshard()
            put_accumulated_gradients(part, gradients)
        for name, parameter in module.named_parameters():
            if f"{_AVERAGED}{name}" in gradients and isinstance(parameter, DTensor):
                gradient: Any = torch.zeros_like(parameter)
                gradient.to_local().copy_(gradients[f"{_AVERAGED}{name}"])
                parameter.grad = gradient

    def own_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Buffers, which each worker has its own of; those of rank 0 are the checkpoint's."""
        if self.ranks.rank == 0:
            return {}
        saved = module.state_dict()
        return {
            name: buffer for name, buffer in module.named_buffers() if name in saved and not isinstance(buffer, DTensor)
        }

    @torch.no_grad()
    def home_state(self, module: nn.Module) -> dict[str, Any] | None:
        if not self.comes_home:
            return None
        whole: dict[str, Any] = {}
        for name, value in self.module_state(module).items():
            tensor = value.full_tensor() if isinstance(value, DTensor) else value
            if self.ranks.rank == 0:
                whole[name] = to_cpu(tensor)
        return whole if self.ranks.rank == 0 else None
