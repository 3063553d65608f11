"""Parameters, gradients and optimizer states in shards: torch's `fully_shard` (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from raytrainer.data.sharding import Share
from raytrainer.errors import ConfigurationError
from raytrainer.metrics.metric_objects import is_metric
from raytrainer.plan.ranks import Ranks
from raytrainer.plan.sharding_settings import FSDP
from raytrainer.private.fsdp_private import (
    is_gathered,
    own_parameters,
)
from raytrainer.strategies.gatherings import Gatherings
from raytrainer.strategies.group_strategy import take_from_first
from raytrainer.strategies.materialising import Materialiser, is_on_meta
from raytrainer.strategies.shard_clipping import clip_shards
from raytrainer.strategies.sharded_state import ShardedState
from raytrainer.strategies.sharder import Sharder
from raytrainer.strategies.step_result import StepResult
from raytrainer.strategies.strategy import Step

__all__ = ["FSDPStrategy"]


@final
class FSDPStrategy(ShardedState):
    """Each worker reads its own share of every loader, and holds a shard of every parameter.

    The user's module is the root: its training step is what FSDP takes for the forward pass. So everything that is in
    no block is whole during a step, whatever the step calls, and its own `forward` is an ordinary method.

    Args:
        ranks: This worker's ranks.
        device: Its device.
        control: A gloo group for agreements that must not wait for the device.
        settings: The strategy's.
        mesh: The workers, in one dimension, or in two: copies by shards.
        store: A store that they share.
        precision: Of the run.
        compiles: Options of torch.compile, for each block; None: not compiled.
        seed: Of the run.
    """

    inference_mode = False  # parameters gathered in it could not be trained with
    compiles_blocks = True

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        control: Any,
        settings: FSDP,
        mesh: Any,
        store: Any,
        *,
        precision: str,
        compiles: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(ranks, device, control)
        self.mesh, self._store, self._seed = mesh, store, seed
        self._sharder = Sharder(settings, mesh, precision, compiles)
        self._root: Any = None
        self._step: Callable[[], Any] = lambda: None  # what the root's forward pass is, of now
        self._reduces = True
        self._shards: list[nn.Parameter] = []
        self._gave = self._nobody = False  # whether this worker, or none, had a loss in the window in progress

    @property
    def share(self) -> Share:
        return Share(self.ranks.rank, self.ranks.world_size)

    # ---------------------------------------------------------------- building

    def place(self, module: nn.Module) -> None:
        """Leave parameters where they are until they are in shards: the whole might not fit."""
        for part in module.modules():
            if is_metric(part):
                part.to(self.device)
            else:
                part._apply(self._moved, recurse=False)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, nn.Parameter) or tensor.is_meta else tensor.to(self.device)

    def shape(self, module: nn.Module, convert: Callable[[nn.Module], None], sync_batchnorm: bool) -> str | None:
        """Shard the module, block by block; return a line that says how."""
        if sync_batchnorm and self.device.type == "cuda" and self.ranks.world_size > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(module)
        self._root = module
        self.comes_home = not is_on_meta(module)
        said = self._sharder.shard(module, convert, Materialiser(module, self.device, self._seed))
        if not self._sharder.settings.cpu_offload:
            module.to(self.device)
        shards = self.mesh.get_group(self.mesh.ndim - 1)
        self._gatherings = Gatherings(module, shards, self._store, self.device, self.control)
        module.__dict__["_fsdp_step"] = lambda _: self._step()
        register_fsdp_forward_method(module, "_fsdp_step")
        for part in {id(part): part for part, _ in own_parameters(module)}.values():
            if part is not module:
                part.register_forward_pre_hook(self._gather_root)
        # the first pass makes this the root, whatever hooks of the user call before the first step
        with torch.no_grad():
            module._fsdp_step(None)  # type: ignore[operator]
        self.refresh(module)
        return said

    # ---------------------------------------------------------------- training

    def _gather_root(self, *args: Any) -> None:
        """A part is called while what is in no block is not there: after a backward pass, or outside of a step."""
        if not is_gathered(self._root):
            self._root.unshard()

    def _run(self, call: Callable[[], Any]) -> Any:
        """Run something as the root's forward pass; its one argument says nothing.

        torch would look through arguments, and on GPUs fails without any.
        """
        outer, self._step = self._step, call
        try:
            return self._root._fsdp_step(None)
        finally:
            self._step = outer

    def prepare(self, module: nn.Module, step: Step) -> Step:
        self.gatherings.forget()
        self.refresh(module)
        self._shards = list(module.parameters())  # the shards, which module.parameters() are not while it is gathered
        if not module.automatic_optimization:
            return lambda batch, batch_idx, dataloader_idx: self._run(lambda: step(batch, batch_idx, dataloader_idx))

        def forward(batch: Any, batch_idx: int, dataloader_idx: int) -> StepResult:
            results: list[StepResult] = []

            def loss_of_step() -> Tensor | None:
                results.append(step(batch, batch_idx, dataloader_idx))
                return results[0].loss

            self.gatherings.begin_step(self._reduces)
            loss: Tensor | None = self._run(loss_of_step)
            result = results[0]._replace(loss=loss)
            # a loss that is a leaf has a gradient of its own, and none for any parameter
            if loss is None or loss.grad_fn is None:
                return result._replace(join=partial(self._join, module))
            self._gave = True
            return result

        return forward

    def _join(self, module: nn.Module) -> None:
        """Take part in the others' backward pass."""
        absent = [parameter for parameter in self._shards if parameter.grad is None]
        self._nobody = self.gatherings.skip_step(nothing=self._reduces and not self._gave)
        if self._nobody:
            for parameter in absent:
                parameter.grad = None

    def may_skip_alone(self, module: nn.Module) -> bool:
        return bool(module.automatic_optimization)

    def settle(self, module: nn.Module, loss: Tensor | None, batch_idx: int) -> bool:
        given = self._gave or not self._nobody
        self._gave = self._nobody = False
        return given

    def check_optimizer(self, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigurationError(
                f"{name} with fsdp: it joins all parameters to one vector, which shards cannot be; use strategy="
                f'"ddp", or an optimizer that updates number by number, such as AdamW.'
            )
        for group in optimizer.param_groups:
            kinds = {isinstance(parameter, DTensor) for parameter in group["params"]}
            fast = [option for option in ("foreach", "fused") if group.get(option)]
            if fast and len(kinds) > 1:
                raise ConfigurationError(
                    f"{name}({fast[0]}=True) with parameters in shards and whole ones (ignored_params) in one group: "
                    f"torch cannot update them together; give them in two parameter groups, or leave {fast[0]} out."
                )

    def sync_next(self, sync: bool) -> None:
        if self._reduces is not sync:
            self._reduces = sync
            self._root.set_requires_gradient_sync(sync)

    def begin_backward(self, module: nn.Module, loss: Tensor) -> Tensor:
        """A backward pass begins within the training step: it is one of the root's."""
        result: Tensor = self._run(lambda: loss)
        return result

    def sync_manual(self, module: nn.Module, batch_idx: int, call: int) -> None:
        """The backward pass itself has reduced them."""

    def end_backward(self, module: nn.Module) -> None:
        self.gatherings.end_step()

    def clip_gradients(self, parameters: Iterable[Tensor], value: float, algorithm: str) -> None:
        clip_shards(parameters, value, algorithm)

    def agree_on_infinities(self, found: Iterable[Tensor]) -> None:
        for number in found:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)

    # ---------------------------------------------------------------- evaluation

    def begin_evaluation(self, module: nn.Module, within_fit: bool) -> None:
        self.refresh(module)
        super().begin_evaluation(module, within_fit)

    def evaluation_step(self, module: nn.Module, step: Step) -> Step:
        return lambda batch, batch_idx, dataloader_idx: self._run(lambda: step(batch, batch_idx, dataloader_idx))

    def begin_round(self, module: nn.Module, has_batch: bool) -> bool:
        if not self.gatherings.several:
            return has_batch
        anybody = self.gatherings.begin_round(has_batch)
        if anybody and not has_batch:
            self.gatherings.serve()
        if not anybody:
            self.refresh(module)  # workers have gathered different things
        return anybody

    def end_round(self, module: nn.Module) -> None:
        self.gatherings.end_round()

    def end_evaluation(self, module: nn.Module) -> None:
        self.refresh(module)

    def sync_buffers(self, module: nn.Module) -> None:
        take_from_first(module.buffers())
