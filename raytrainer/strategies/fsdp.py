"""Parameters, gradients and optimizer states in shards: torch's `fully_shard` (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from raytrainer.data.sharding import Share
from raytrainer.metrics.metric_objects import count_once, is_metric
from raytrainer.plan.ranks import Ranks
from raytrainer.plan.sharding_settings import FSDP
from raytrainer.private.fsdp_private import is_gathered, own_parameters
from raytrainer.strategies.gatherings import Gatherings
from raytrainer.strategies.group_strategy import take_from_first
from raytrainer.strategies.lost_edits import LostEdits, refuse_lost_edits
from raytrainer.strategies.materialising import Materialiser
from raytrainer.strategies.meta_modules import is_on_meta, start_weights_of
from raytrainer.strategies.optimizer_refusals import refuse_optimizer
from raytrainer.strategies.reading_weights import WeightFiles
from raytrainer.strategies.same_start import SameStart
from raytrainer.strategies.shard_clipping import clip_shards
from raytrainer.strategies.sharded_state import ShardedState
from raytrainer.strategies.sharder import Sharder
from raytrainer.strategies.sharding_refusals import explained, refuse_hooks, refuse_sharded_loss
from raytrainer.strategies.step_result import StepResult
from raytrainer.strategies.strategy import Step

__all__ = ["FSDPStrategy"]


@final
class FSDPStrategy(ShardedState):
    """Each worker holds a shard of every parameter, and reads its own share of every loader.

    With `ModelParallel`, workers that split layers with each other read one share. The mesh's last dimension is theirs,
    and shards are over the dimensions before.

    The user's module is the root: its training step is what FSDP takes for the forward pass. So everything that is in
    no block is whole during a step, whatever the step calls, and its own `forward` is an ordinary method.

    Args:
        ranks: This worker's ranks.
        device: Its device.
        control: A gloo group for agreements that must not wait for the device.
        settings: The strategy's.
        mesh: The workers: (copies, if there are several), shards, workers that split layers.
        store: A store that they share.
        precision: Of the run.
        compiles: Options of torch.compile, for each block; None: not compiled.
        seed: Of the run.
    """

    inference_mode = False  # parameters gathered in it could not be trained with
    compiles_blocks = True
    evaluates_alone = False  # workers gather together what each one needs

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
        self.device_mesh, self._store, self._seed = mesh, store, seed
        self._splitters = int(mesh.size(mesh.ndim - 1))
        names = mesh.mesh_dim_names[:-1]
        self.mesh = mesh[names if len(names) > 1 else names[0]]
        self._sharder = Sharder(settings, self.mesh, precision, compiles)
        self._root: Any = None
        self._step: Callable[[], Any] = lambda: None  # what the root's forward pass is, of now
        self._reduces = True
        self._shards: list[nn.Parameter] = []
        self._edits: LostEdits | None = None  # of the fit in progress
        self._gave = self._nobody = False  # whether this worker, or none, had a loss in the window in progress

    @property
    def share(self) -> Share:
        ranks, splitters = self.ranks, self._splitters
        return Share(ranks.rank // splitters, ranks.world_size // splitters, readers=splitters)

    @property
    def stream(self) -> int:
        return self.share.index

    @property
    def counts(self) -> bool:
        return self.ranks.rank % self._splitters == 0

    # ---------------------------------------------------------------- building

    def place(self, module: nn.Module) -> None:
        """Leave parameters where they are until they are in shards: the whole might not fit."""
        for part in module.modules():
            if is_metric(part):
                part.to(self.device)
                count_once(part, self._splitters)
            else:
                part._apply(self._moved, recurse=False)
        self._start = SameStart(module)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, nn.Parameter) or tensor.is_meta else tensor.to(self.device)

    def shape(self, module: nn.Module, convert: Callable[[nn.Module], None], sync_batchnorm: bool) -> str | None:
        """Shard the module, block by block; return a line that says how."""
        if sync_batchnorm and self.device.type == "cuda" and self.ranks.world_size > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(module)
        self._start.share(module, self.device, self.control)
        del self._start  # it has the whole of every parameter
        self._root = module
        self.comes_home = not is_on_meta(module)
        source = None if self.resumes else start_weights_of(module)
        files = None if source is None else WeightFiles(module, source)
        given = files.given if files is not None else set()
        said = self._sharder.shard(module, convert, Materialiser(module, self.device, self._seed, given))
        if not self._sharder.settings.cpu_offload:
            module.to(self.device)
        shards = self.mesh.get_group(self.mesh.ndim - 1)
        timeout = self._sharder.settings.timeout_seconds
        self._gatherings = Gatherings(module, shards, self._store, self.device, self.control, timeout)
        module.__dict__["_fsdp_step"] = lambda _: self._step()
        register_fsdp_forward_method(module, "_fsdp_step")
        for part in {id(part): part for part, _ in own_parameters(module)}.values():
            if part is not module:
                part.register_forward_pre_hook(self._gather_root)
        # the first pass makes this the root, whatever hooks of the user call before the first step
        with torch.no_grad():
            module._fsdp_step(None)  # type: ignore[operator]
        self.refresh(module)
        if files is not None:
            files.load(module)
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
            with explained():
                return self._root._fsdp_step(None)
        finally:
            self._step = outer

    def prepare(self, module: nn.Module, step: Step) -> Step:
        self.gatherings.forget()
        self.refresh(module)
        refuse_hooks(module)
        edits = self._edits = LostEdits(module, self._sharder.compiles is not None)
        step = edits.watched(step)
        self._shards = list(module.parameters())  # the shards, which module.parameters() are not while it is gathered
        if not module.automatic_optimization:

            def manual(batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
                self.gatherings.begin_step("manual")
                self.gatherings.keep(True)
                edits.begin_step()
                output = self._run(lambda: step(batch, batch_idx, dataloader_idx))
                self.gatherings.end_step()
                return output

            return manual

        def forward(batch: Any, batch_idx: int, dataloader_idx: int) -> StepResult:
            results: list[StepResult] = []

            def loss_of_step() -> Tensor | None:
                results.append(step(batch, batch_idx, dataloader_idx))
                return results[0].loss

            self.gatherings.begin_step(self._reduces)
            self.gatherings.keep(True)
            edits.begin_step()
            loss: Tensor | None = self._run(loss_of_step)
            self.gatherings.keep(False)
            refuse_sharded_loss(loss, self.device_mesh)
            result = results[0]._replace(loss=loss)
            # a loss that is a leaf has a gradient of its own, and none for any parameter
            if loss is None or loss.grad_fn is None:
                return result._replace(join=partial(self._join, module))
            edits.look_before_backward(loss)
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
        refuse_optimizer(optimizer)
        optimizer.register_step_pre_hook(self._look_before_step)
        optimizer.register_step_post_hook(lambda *_: self.gatherings.renew(not self._root.automatic_optimization))

    def _look_before_step(self, *args: Any) -> None:
        if self._edits is not None:
            self._edits.look("training_step, or a hook before the optimizer's,")

    def sync_next(self, sync: bool) -> None:
        if self._reduces is not sync:
            self._reduces = sync
            self._root.set_requires_gradient_sync(sync)

    def manual_backward(self, module: nn.Module, loss: Tensor, backward: Callable[[Tensor], None]) -> None:
        """A backward pass within the training step: it is one of the root's."""
        refuse_sharded_loss(loss, self.device_mesh)
        if self._edits is not None:
            self._edits.look()
        loss = self._run(lambda: loss)
        self.gatherings.keep(False)
        backward(loss)
        self.gatherings.keep(True)

    def sync_manual(self, module: nn.Module, batch_idx: int, call: int) -> None:
        """The backward pass itself has reduced them."""

    def end_backward(self, module: nn.Module) -> None:
        self.gatherings.end_step()

    def clip_gradients(self, parameters: Iterable[Tensor], value: float, algorithm: str) -> None:
        if algorithm != "value":
            self.gatherings.together("clip")
        clip_shards(parameters, value, algorithm)

    def agree_on_infinities(self, found: Iterable[Tensor]) -> None:
        for number in found:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)

    # ---------------------------------------------------------------- evaluation

    def begin_evaluation(self, module: nn.Module, within_fit: bool) -> None:
        self.refresh(module)
        super().begin_evaluation(module, within_fit)

    def evaluation_step(self, module: nn.Module, step: Step) -> Step:
        def evaluate(batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            self.gatherings.begin_evaluation_step()
            output = self._run(lambda: step(batch, batch_idx, dataloader_idx))
            self.gatherings.end_step()
            return output

        return evaluate

    def begin_round(self, module: nn.Module, has_batch: bool, computes: bool) -> bool:
        if not self.gatherings.several:
            if not has_batch:
                self.end_evaluation(module)  # the next hooks may change weights, which are shards then, as with several
            return has_batch
        anybody = self.gatherings.begin_round(has_batch, computes)
        if anybody and not computes:
            self.gatherings.serve()
        if not anybody:
            self.end_evaluation(module)  # workers have gathered different things
        return anybody

    def end_round(self, module: nn.Module) -> None:
        self.gatherings.end_round()

    def end_evaluation(self, module: nn.Module) -> None:
        refuse_lost_edits(module, "an evaluation's step, or a hook around it,")
        self.refresh(module)

    def sync_buffers(self, module: nn.Module) -> None:
        take_from_first(buffer for buffer in module.buffers() if not isinstance(buffer, DTensor))
