"""What DDP2 and DP share: the workers of a node split its batch, and gather what they made of their slices.

The factor. Let N nodes have k workers each, worker r of node n return z_r = f(slice_r, w) with parameters w, and every
worker of the node compute the same loss L_n(z_1, ..., z_k, w) in `training_step_end`, in which w may appear once more.
Wanted is the mean over nodes of

    dL_n/dw = sum over r of (dL_n/dz_r)(dz_r/dw) + (partial L_n)/(partial w).

The backward pass of the gather gives worker r the sum over the node's workers of their gradients with respect to z_r;
all k are equal, so that is k dL_n/dz_r. Worker r's own gradient is therefore k (dL_n/dz_r)(dz_r/dw) + (partial L_n)/
(partial w). DDP averages over all N k workers: summing over r and dividing by k gives dL_n/dw exactly, in the indirect
and in the direct term, and dividing by N the mean over nodes. So the loss needs no factor of its own. Should the
workers' losses differ after all (dropout in `training_step_end`), the result is the gradient of their mean.

Without `training_step_end` the node's loss is sum over r of (s_r / S) l_r, with s_r of the node's S samples in slice r.
Worker r backpropagates k (s_r / S) l_r, and DDP's average over the N k workers is again the mean over nodes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raytrainer.data.sharding import Share
from raytrainer.data.slicing import unjoinable
from raytrainer.data.transfer import map_leaves
from raytrainer.errors import DataError
from raytrainer.plan.ranks import Ranks
from raytrainer.plan.strategy_settings import DDP
from raytrainer.strategies.replicated import ReplicatedStrategy
from raytrainer.strategies.strategy import NOTHING

__all__ = ["NodeStrategy"]

#: Bytes for the pickled structure of an output; larger ones take a second collective.
_ROOM = 2048


class NodeStrategy(ReplicatedStrategy):
    """Workers that read the same batches, each taking a slice. Its subclasses say which batches a node reads.

    Args:
        ranks: This worker's ranks.
        device: Its device.
        control: A gloo group of all workers.
        settings: Of DistributedDataParallel.
        node: The group of this node's workers, for tensors on the device.
        node_control: The same over gloo.
        store: That all workers share.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        control: Any = None,
        settings: DDP | None = None,
        node: Any = None,
        node_control: Any = None,
        store: Any = None,
    ) -> None:
        super().__init__(ranks, device, control, settings, store)
        self._node, self._node_control = node, node_control
        self._module: nn.Module | None = None

    @property
    def split(self) -> Share:
        return Share(self.ranks.local_rank, self.ranks.local_world_size)

    def prepare(self, module: nn.Module, step: Callable[[Any, int, int], Any]) -> Callable[[Any, int, int], Any]:
        self._module = module
        return super().prepare(module, step)

    def gather(self, output: Any) -> list[Any]:
        """See `Strategy.gather`. Tensors may differ between workers in their first dimension.

        Raises:
            DataError: They differ in more than that. Raised on all workers of the node.
        """
        tensors: list[Tensor] = []

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                inner = getattr(value, "__dict__", {}).values()
                if hasattr(value, "to") or any(isinstance(item, Tensor) and item.requires_grad for item in inner):
                    raise DataError(unjoinable(value))
                return value
            tensors.append(value)
            return _Place(value, len(tensors) - 1)

        own = None if output is NOTHING else (map_leaves(output, place),)
        skeletons = _exchange(own, self.split.count, self._node_control)
        places = [None if skeleton is None else _places(skeleton[0]) for skeleton in skeletons]
        _check(places)
        count = len(next(found for found in places if found is not None))
        gathered = [
            self._gather_tensor(tensors[i] if tensors else None, [found[i] if found else None for found in places])
            for i in range(count)
        ]

        def fill(worker: int) -> Callable[[Any], Any]:
            return lambda value: gathered[value.index][worker] if isinstance(value, _Place) else value

        return [map_leaves(s[0], fill(worker)) for worker, s in enumerate(skeletons) if s is not None]

    def _gather_tensor(self, tensor: Tensor | None, places: Sequence[_Place | None]) -> list[Tensor]:
        """Each worker's tensor; one without rows for a worker that has none."""
        some = next(place for place in places if place is not None)
        tail = some.shape[1:]
        if tensor is None:
            tensor = self._zero(some.dtype).reshape(1, *(1 for _ in tail)).expand(0, *tail)
        elif tensor.ndim == 0:
            tensor = tensor.reshape(1)
        tensor = tensor.to(self.device)
        if any(place is not None and place.grad for place in places) and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()  # so that this worker joins in the backward pass
        sizes = [0 if place is None else place.rows for place in places]
        parts = _Gather.apply(tensor, sizes, self.split.index, self._node)
        return [part.reshape(()) if not some.shape and size else part for part, size in zip(parts, sizes, strict=True)]

    def _zero(self, dtype: torch.dtype) -> Tensor:
        """Zero, which depends on all parameters: a worker without samples has zero gradients, after the gather's.

        That order matters: all workers must begin the same collectives in the same order.
        """
        zero = torch.zeros((), dtype=dtype, device=self.device)
        if self._module is None or not torch.is_grad_enabled() or not dtype.is_floating_point:
            return zero
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                zero = zero + (parameter.sum() * 0.0).to(dtype)
        return zero


def _exchange(value: Any, count: int, group: Any) -> list[Any]:
    """Every worker's value, by rank. One collective if all are small, which halves `all_gather_object`'s time."""
    pickled = pickle.dumps(value)
    boxes, room = [b""] * count, _ROOM
    while any(len(box) < 8 or int.from_bytes(box[:8], "little") > len(box) - 8 for box in boxes):
        room = max([room, *(int.from_bytes(box[:8], "little") for box in boxes)])
        own = torch.zeros(8 + room, dtype=torch.uint8)
        letter = len(pickled).to_bytes(8, "little") + pickled[:room]
        own[: len(letter)] = torch.frombuffer(bytearray(letter), dtype=torch.uint8)
        received = [torch.empty_like(own) for _ in range(count)]
        dist.all_gather(received, own, group=group)
        boxes = [bytes(box.tolist()) for box in received]
    return [pickle.loads(box[8:]) for box in boxes]


class _Place:
    """Stands for a tensor in an output whose structure is sent."""

    def __init__(self, tensor: Tensor, index: int) -> None:
        self.index, self.shape, self.dtype = index, tuple(tensor.shape), tensor.dtype
        self.grad = tensor.requires_grad and torch.is_grad_enabled()

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be the same on all workers."""
        return self.dtype, len(self.shape), self.shape[1:]


def _places(skeleton: Any) -> list[_Place]:
    found: list[_Place] = []

    def note(value: Any) -> Any:
        if isinstance(value, _Place):
            found.append(value)
        return value

    map_leaves(skeleton, note)
    return found


def _check(places: Sequence[list[_Place] | None]) -> None:
    """All workers that had samples returned the same tensors, but for their first dimension."""
    present = [(rank, found) for rank, found in enumerate(places) if found is not None]
    kinds = [[place.kind for place in found] for _, found in present]
    if any(other != kinds[0] for other in kinds):
        shapes = "; ".join(
            f"local rank {rank}: {[(tuple(p.shape), str(p.dtype).removeprefix('torch.')) for p in found]}"
            for rank, found in present
        )
        raise DataError(
            f"the workers of a node returned tensors that cannot be joined: {shapes}. They may differ in the first "
            f"dimension only; a step must return the same structure on every worker, and None on all or none."
        )


class _Gather(torch.autograd.Function):
    """Every worker's rows on every worker. Backward: the sum over workers of the gradients with respect to own rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int], index: int, group: Any) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.index, ctx.group = sizes, index, group
        most = max(sizes)
        missing = tensor.new_zeros((most - tensor.shape[0], *tensor.shape[1:]))
        rows = torch.cat([tensor, missing]) if len(missing) else tensor.contiguous()
        parts = [torch.empty_like(rows) for _ in sizes]
        if rows.numel():
            dist.all_gather(parts, rows, group=group)
        return tuple(part[:size] for part, size in zip(parts, sizes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        # one all_reduce, since gloo has no reduce_scatter of uneven parts
        total = torch.cat(gradients).contiguous()  # gloo adds up what lies at the same place in memory
        if total.numel():
            dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.sizes)[ctx.index], None, None, None
