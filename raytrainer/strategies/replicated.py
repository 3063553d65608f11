"""What all strategies with several workers share: one replica of the module each, gradients averaged by torch's DDP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from raytrainer.errors import ConfigurationError, DisagreementError
from raytrainer.plan.folding import few
from raytrainer.plan.ranks import Ranks
from raytrainer.plan.strategy_settings import DDP
from raytrainer.private.torch_private import averaging_check, fix_buckets
from raytrainer.strategies.averaging import average_gradients
from raytrainer.strategies.group_strategy import GroupStrategy, take_from_first
from raytrainer.strategies.joining import Absentees, JoinedStep, Reached, leaves_of, sparse_parameters
from raytrainer.strategies.meeting import END
from raytrainer.strategies.same_shapes import refuse_other_shapes
from raytrainer.strategies.sparse_averages import Hook, sparse_too
from raytrainer.strategies.step_result import StepResult

__all__ = ["ReplicatedStrategy"]

_COMPRESSION = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


class ReplicatedStrategy(GroupStrategy):
    """torch's DistributedDataParallel over NCCL or gloo. Its subclasses say who reads what.

    Args:
        ranks: This worker's ranks.
        device: Its device.
        control: A gloo group for agreements that must not wait for the device.
        settings: Of DistributedDataParallel.
        store: That all workers share.
    """

    def __init__(
        self, ranks: Ranks, device: torch.device, control: Any = None, settings: DDP | None = None, store: Any = None
    ) -> None:
        super().__init__(ranks, device, control)
        self._store = store
        self._absentees: Absentees | None = None
        self._reached: Reached | None = None
        self._check: Callable[[], None] | None = None  # raises where DDP still waits for gradients
        self.settings = settings or DDP()
        self._ddp: DistributedDataParallel | None = None
        self._step: JoinedStep | None = None
        self._gave = False  # whether this worker had a loss in the window in progress
        self._frozen: list[nn.Parameter] = []  # when DDP was told what it averages
        self._absent: list[nn.Parameter] = []  # had no gradient before this worker joined in with zeros

    def prepare(self, module: nn.Module, step: Callable[[Any, int, int], Any]) -> Callable[[Any, int, int], Any]:
        if self._reached is not None:
            self._reached.close()
            self._reached = None
        if self.ranks.world_size > 1:
            refuse_other_shapes(module, self.control, self.settings.broadcast_buffers)
        trainable = [p for p in module.parameters() if p.requires_grad]
        self._frozen = [p for p in module.parameters() if not p.requires_grad]
        if not trainable:
            return step
        lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
        if lazy and self.ranks.world_size > 1:
            raise ConfigurationError(
                f"{', '.join(lazy[:3])}: lazy modules have no shape before their first batch, so workers cannot begin "
                f"alike. Call the module with one batch before fit, or in configure_model."
            )
        if not module.automatic_optimization:
            # DDP allows one backward pass for each forward pass, so sync_manual averages; here ranks begin alike
            take_from_first((*module.parameters(), *module.buffers()))
            return step
        if self.ranks.world_size == 1 and self.settings.gradient_compression is None:
            return step  # there is nobody to average with, which DDP would take a tenth of a small step for
        # The sum of three or more numbers depends, in its last bit, on the order in which they are added, and that on
        # a gradient's place in DDP's buckets. With more than two workers the places are therefore fixed.
        fixed = self.ranks.world_size > 2 and not self.settings.find_unused_parameters
        waits = not self.settings.find_unused_parameters
        self._step = JoinedStep(module, step, backwards=fixed, all_needed=waits)
        self._absentees = Absentees(self._store, self.control, self.ranks.world_size)
        if waits:
            self._reached = Reached(trainable[-1])
        self._ddp = DistributedDataParallel(self._step, **self.settings.options)
        self._check = averaging_check(self._ddp)
        if fixed:
            fix_buckets(self._ddp)
        hook: Hook | None = None  # DDP's own way, without a hook, is quicker
        if self.settings.gradient_compression is not None:
            hook = _COMPRESSION[self.settings.gradient_compression]
        if self.device.type == "cpu" and self.ranks.world_size > 1 and sparse_parameters(module):
            hook = sparse_too(hook or default_hooks.allreduce_hook, self.control)
        if hook is not None:
            self._ddp.register_comm_hook(None, hook)
        return partial(self._joined_step, self._ddp, self._step)

    def _joined_step(
        self, ddp: DistributedDataParallel, step: JoinedStep, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> StepResult:
        if self._reached is not None:
            self._reached.seen.clear()
        joined: Tensor | None = ddp.forward(batch, batch_idx)  # nobody has hooks on what is made here
        result = step.result
        step.forget()
        if joined is None:
            return result
        if step.skipped:
            if not ddp.require_backward_grad_sync:
                return result
            if self.settings.static_graph:
                raise ConfigurationError(
                    f"training_step returned no loss in batch {batch_idx} of rank {self.ranks.rank}: with "
                    f"DDP(static_graph=True) every worker uses the same parameters in each step. Leave static_graph "
                    f"out, or return a loss of zero that depends on them, such as 0.0 * self(x).sum()."
                )
            return result._replace(join=partial(self._join, step, joined))
        self._gave = True
        return result if joined is result.loss else result._replace(loss=joined)

    def _join(self, step: JoinedStep, joined: Tensor) -> None:
        self._absent = step.without_gradient()
        if not self._gave and self._absentees is not None:
            self._absentees.count()
        joined.backward()  # type: ignore[no-untyped-call]

    def sync_next(self, sync: bool) -> None:
        if self._ddp is not None and self._ddp.require_backward_grad_sync is not sync:
            self._ddp.require_backward_grad_sync = sync

    def settle(self, module: nn.Module, loss: Tensor | None, batch_idx: int) -> bool:
        check, absentees, reached = self._check, self._absentees, self._reached
        if self.ranks.world_size > 1 and any(p.requires_grad and p.grad is not None for p in self._frozen):
            self._refuse_unfrozen(module, batch_idx)
        if check is None or absentees is None:
            return True
        complete = loss is None or reached is None or bool(reached.seen)
        try:
            check()
        except RuntimeError:
            complete = False
        if not complete:
            self._refuse_unused(module, loss, batch_idx)
        given = True
        if absentees.counted:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            given = not absentees.are_all()
        if not given:
            for parameter in self._absent:
                parameter.grad = None
        absentees.next_window()
        self._gave, self._absent = False, []
        return given

    def may_skip_alone(self, module: nn.Module) -> bool:
        # where DDP averages it takes part with zero gradients; but what waits for others in user code is not known, and
        # SyncBatchNorm does so in forward passes
        synchronised = any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())
        return bool(module.automatic_optimization) and not synchronised

    def _refuse_unfrozen(self, module: nn.Module, batch_idx: int) -> None:
        frozen = {id(parameter) for parameter in self._frozen}
        names = few([name for name, p in module.named_parameters() if id(p) in frozen and p.requires_grad], 5)
        raise ConfigurationError(
            f"{names} began to train in the midst of an epoch, by batch {batch_idx}: ddp averages gradients of what "
            f"trained as the epoch began. Unfreeze in on_train_epoch_start, of the module or a callback "
            f"(BaseFinetuning.finetune_function), or use strategy='fsdp', where it may be done after any batch."
        )

    def _refuse_unused(self, module: nn.Module, loss: Tensor | None, batch_idx: int) -> None:
        reached = set() if loss is None else leaves_of(loss)
        unused = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in reached]
        raise DisagreementError(
            f"the loss of rank {self.ranks.rank} in batch {batch_idx} does not depend on "
            f"{few(unused, 5) or 'all parameters'}: "
            f"the other workers wait for their gradients. Use "
            f"strategy={type(self.settings).__name__}(find_unused_parameters=True), freeze what is never used "
            f"(requires_grad_(False)), or return None to skip a batch."
        )

    def sync_manual(self, module: nn.Module, batch_idx: int, call: int) -> None:
        self.meeting.batch, self.meeting.calls = batch_idx, call
        average_gradients(module, self.meeting)

    def end_manual(self, batch_idx: int) -> None:
        self.meeting.batch = batch_idx
        self.meeting.meet(END)

    def replicas(self, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        # a buffer that nobody broadcasts is each worker's own
        buffers = dict(module.named_buffers()) if self.settings.broadcast_buffers else {}
        return dict(module.named_parameters()), buffers

    def own_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        if self.settings.broadcast_buffers or self.ranks.rank == 0:  # rank 0's are in the state dict
            return {}
        saved = module.state_dict()
        return {name: buffer for name, buffer in module.named_buffers() if name in saved}

    def sync_buffers(self, module: nn.Module) -> None:
        if not self.settings.broadcast_buffers:
            return
        take_from_first(module.buffers())
