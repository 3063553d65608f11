"""What strategies of several workers share, however the module is laid out: agreements over their process group."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raytrainer.plan.ranks import Ranks
from raytrainer.strategies.meeting import NEXT, Meeting
from raytrainer.strategies.stop_board import StopBoard
from raytrainer.strategies.strategy import Strategy

__all__ = ["GroupStrategy", "take_from_first"]


class _Gather(torch.autograd.Function):
    """Tensors of all workers, stacked; backward, each worker's part gets the sum of all workers' gradients for it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.rank = ranks.rank
        parts = [torch.empty_like(tensor) for _ in range(ranks.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.rank], None


class GroupStrategy(Strategy):
    """One of several workers that form a torch.distributed group.

    Args:
        ranks: This worker's ranks.
        device: Its device.
        control: A gloo group for agreements that must not wait for the device.
    """

    def __init__(self, ranks: Ranks, device: torch.device, control: Any = None) -> None:
        super().__init__(ranks, device)
        self.control = control
        self.store: Any = None  # that all workers share
        self.board: StopBoard | None = None  # where workers of one host say that they are to stop; others vote
        self.votes = control  # or a group of their own, so that they never pair with what training does
        self.meeting = Meeting(control, ranks.world_size)

    def replicas(self, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters, and buffers, of which workers that have the same of `pieces` are to hold the same."""
        return {}, {}

    def pieces(self, module: nn.Module) -> dict[str, str]:
        """Which piece this worker holds of those that are in pieces."""
        return {}

    def of_first(self, module: nn.Module, name: str, part: Tensor) -> Tensor:
        """Part of a replica, as the first worker that is to hold the same has it. All call this together."""
        return self.all_gather(part)[0]

    def all_agree(self, flag: bool) -> bool:
        return bool(self.meeting.meet(NEXT, int(flag))[0])

    def begin_any(self, flag: bool) -> Callable[[], bool]:
        """Begin to find out whether `flag` is true on any worker; what this returns waits for the answer.

        All workers begin together, and ask for the answer together. No device is waited for.
        """
        vote = torch.tensor([int(flag)])
        work = dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.votes, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(vote.item())

        return answer

    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        tensor = tensor.contiguous()
        gathered: Tensor = _Gather.apply(tensor if sync_grads else tensor.detach(), self.ranks)
        return gathered

    def gather_objects(self, value: Any) -> list[Any] | None:
        gathered: list[Any] | None = [None] * self.ranks.world_size if self.ranks.rank == 0 else None
        dist.gather_object(value, gathered, dst=0, group=self.control)
        return gathered

    def barrier(self) -> None:
        dist.barrier(group=self.control)


@torch.no_grad()
def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every worker rank 0's values, in place.

    gloo takes what is not contiguous for its memory, so views with holes and expanded tensors travel as copies; NCCL
    refuses them.
    """
    for tensor in tensors:
        own = tensor.data
        if own.layout is torch.strided:
            for dimension, stride in enumerate(own.stride()):
                if stride == 0 and own.shape[dimension] > 1:
                    own = own.narrow(dimension, 0, 1)  # one number that is seen many times
        if own.layout is not torch.strided or own.is_contiguous():
            dist.broadcast(own, src=0)
        else:
            whole = own.contiguous()
            dist.broadcast(whole, src=0)
            own.copy_(whole)
