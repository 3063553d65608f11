"""What all strategies with several workers share: one replica of the module each, gradients averaged by torch's DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from raytrainer.plan.ranks import Ranks
from raytrainer.plan.strategy_settings import DDP
from raytrainer.private.torch_private import fix_buckets
from raytrainer.strategies.strategy import Strategy

__all__ = ["ReplicatedStrategy"]

_COMPRESSION = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


class _Step(nn.Module):
    """What DDP wraps: its forward is the training step, so that DDP sees the pass from its beginning."""

    def __init__(self, module: nn.Module, step: Callable[[Any, int, int], Any], backwards: bool) -> None:
        super().__init__()
        if backwards:  # DDP numbers parameters as it finds them, and finds these first
            self.backwards = nn.ParameterList(reversed(list(module.parameters())))
        self.module = module
        self.__dict__["step"] = step

    def forward(self, batch: Any, batch_idx: int) -> Any:
        output = self.__dict__["step"](batch, batch_idx, 0)
        if output is None and self.module.automatic_optimization:
            # a rank that skips its batch must still take part in the averaging: with zero gradients
            return _Skipped(sum(p.sum() * 0.0 for p in self.module.parameters() if p.requires_grad))
        return output


class _Skipped(dict[str, Any]):
    """The output of a rank that skipped: a loss whose gradients are zero."""

    def __init__(self, loss: Any) -> None:
        super().__init__(loss=loss)


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


class ReplicatedStrategy(Strategy):
    """torch's DistributedDataParallel over NCCL or gloo. Its subclasses say who reads what.

    Args:
        ranks: This worker's ranks.
        device: Its device.
        control: A gloo group for agreements that must not wait for the device.
        settings: Of DistributedDataParallel.
    """

    def __init__(self, ranks: Ranks, device: torch.device, control: Any = None, settings: DDP | None = None) -> None:
        super().__init__(ranks, device)
        self.control = control
        self.settings = settings or DDP()
        self._ddp: DistributedDataParallel | None = None

    def prepare(self, module: nn.Module, step: Callable[[Any, int, int], Any]) -> Callable[[Any, int, int], Any]:
        trainable = any(p.requires_grad for p in module.parameters())
        if not trainable:
            return step
        if not module.automatic_optimization:
            # DDP allows one backward pass for each forward pass, so sync_manual averages; here ranks begin alike
            _broadcast_state(module)
            return step
        # The sum of three or more numbers depends, in its last bit, on the order in which they are added, and that on
        # a gradient's place in DDP's buckets. With more than two workers the places are therefore fixed.
        fixed = self.ranks.world_size > 2 and not self.settings.find_unused_parameters
        self._ddp = DistributedDataParallel(_Step(module, step, backwards=fixed), **self.settings.options)
        if fixed:
            fix_buckets(self._ddp)
        if self.settings.gradient_compression is not None:
            self._ddp.register_comm_hook(None, _COMPRESSION[self.settings.gradient_compression])
        ddp = self._ddp
        return lambda batch, batch_idx, dataloader_idx: ddp(batch, batch_idx)

    def sync_next(self, sync: bool) -> None:
        if self._ddp is not None and self._ddp.require_backward_grad_sync is not sync:
            self._ddp.require_backward_grad_sync = sync

    @torch.no_grad()
    def sync_manual(self, module: nn.Module) -> None:
        """Average gradients over workers, in one collective per dtype.

        Averaging what earlier passes had already averaged leaves it as it is, so several backward passes before a step
        are right too. A gradient that no worker has stays None.
        """
        parameters = [p for p in module.parameters() if p.requires_grad]
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=self.device)
        dist.all_reduce(present)
        kinds: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter, count in zip(parameters, present.tolist(), strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                kinds.setdefault(parameter.grad.dtype, []).append(parameter)
        for members in kinds.values():
            gradients = [p.grad for p in members if p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            flat /= self.ranks.world_size
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def sync_buffers(self, module: nn.Module) -> None:
        if not self.settings.broadcast_buffers:
            return
        for buffer in module.buffers():
            dist.broadcast(buffer.data, src=0)

    def all_agree(self, flag: bool) -> bool:
        vote = torch.tensor([int(flag)])
        dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=self.control)
        return bool(vote.item())

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
def _broadcast_state(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.data, src=0)
