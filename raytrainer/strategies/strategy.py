"""The worker's side of a strategy: the seam through which everything goes that depends on who holds what.

Loops call it and never ask how many workers there are, nor whether each holds the whole module. In the order in which
a run comes to them:

    place, building         the module, on the device; what its `configure_model` is called in
    shape                   the module, between `configure_model` and the optimizers
    check_optimizer         each of them
    prepare                 the training step, with whatever synchronises gradients
    sync_next, end_backward, settle
                            each backward pass that the loop runs
    manual_backward, sync_manual, end_manual
                            with manual optimization: each backward pass, and a chunk's end
    agree_on_infinities, clip_gradients
                            before an optimizer's step
    refresh                 after parameters were changed by others
    begin_evaluation, evaluation_step, begin_round, end_round, end_evaluation
    module_state, optimizer_state, accumulated, own_tensors, holds_common, own_part
    take_up, load_module, load_optimizer, put_accumulated
    averaged_tensors, local_part, as_held  what callbacks that average weights copy and change
    home_state              what the driver's module takes up at the end

A worker's *rank* is its place in the group; its *part of the data* is `share`, with `split` a slice of each batch.
They differ: workers that hold pieces of one model read the same part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raytrainer.checkpointing.pieces import whole_state
from raytrainer.checkpointing.weights import load_into, require_state
from raytrainer.data.sharding import Share
from raytrainer.data.transfer import to_cpu
from raytrainer.plan.ranks import Ranks
from raytrainer.strategies.clipping import clip_whole_gradients
from raytrainer.strategies.meta_modules import refuse_meta
from raytrainer.strategies.optimizer_types import load_optimizer_state

__all__ = ["NOTHING", "Step", "Strategy"]

#: What a worker whose slice of a batch is empty has to gather.
NOTHING: Any = object()

#: A step of a module: (batch, batch_idx, dataloader_idx).
Step: TypeAlias = Callable[[Any, int, int], Any]


class Strategy(ABC):
    """One worker's part in a group. Concrete strategies are final.

    What is written here holds where each worker has the whole module; a strategy that shards it overrides that.
    """

    inference_mode: bool = True  # whether evaluations may run under `torch.inference_mode`
    evaluates_alone: bool = True  # whether a worker without a batch left is done, whatever the others have
    compiles_blocks: bool = False  # whether `shape` compiles what is to be compiled
    resumes: bool = False  # whether a checkpoint's weights will be loaded
    comes_home: bool = True  # whether the weights go into the driver's module at the end
    device_mesh: Any = None  # the workers as torch's DeviceMesh, where shards are

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device

    # ---------------------------------------------------------------- which part of the data

    @property
    @abstractmethod
    def share(self) -> Share:
        """Which part of every loader this worker gets."""

    @property
    def split(self) -> Share:
        """Which slice of every batch that is read this worker takes; the whole, but where a node's workers split it."""
        return Share(0, 1)

    @property
    def stream(self) -> int:
        """Which of the job's random streams (dropout, augmentation) is this worker's; equal where batches are."""
        return self.ranks.rank

    @property
    def counts(self) -> bool:
        """Whether this worker answers for its part of the data: of those that read the same, one does."""
        return True

    def gather(self, output: Any) -> list[Any]:
        """Outputs of the workers that split a batch, by rank, without those that had `NOTHING`. Differentiable."""
        return [output]

    # ---------------------------------------------------------------- building and training

    def place(self, module: nn.Module) -> None:
        """Bring the module, as it was sent, to the device."""
        refuse_meta(module)
        module.to(self.device)

    def building(self, module: nn.Module) -> AbstractContextManager[None]:
        """What the module's `configure_model` is called in."""
        return nullcontext()

    def shape(self, module: nn.Module, convert: Callable[[nn.Module], None], sync_batchnorm: bool) -> str | None:
        """Give the module the form in which it trains, before there are optimizers.

        Args:
            module: Built, on whatever device.
            convert: Casts it to the run's precision.
            sync_batchnorm: Whether it is to normalise by the samples of all workers.

        Returns:
            A line that says what was done, if that is worth one.
        """
        if sync_batchnorm and self.device.type == "cuda" and self.ranks.world_size > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(module)
        convert(module)
        module.to(self.device)
        return None

    @abstractmethod
    def prepare(self, module: nn.Module, step: Step) -> Step:
        """Ready the module for training; return the training step to call, forward synchronisation included.

        With automatic optimization `step` returns a `StepResult`, and so must what is returned here.
        """

    @abstractmethod
    def sync_next(self, sync: bool) -> None:
        """Whether the next backward pass synchronises gradients; False on accumulating batches."""

    def settle(self, module: nn.Module, loss: Tensor | None, batch_idx: int) -> bool:
        """After each backward pass that synchronises (or `StepResult.join`): see that it has.

        Returns:
            Whether any worker had a loss since gradients were zeroed. Where none had, they are as if there had been no
            backward pass.

        Raises:
            DisagreementError: Other workers wait for gradients that this one's loss does not depend on.
        """
        return True

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise a ConfigurationError for one that cannot work with parameters as they are held here."""
        return None

    def manual_backward(self, module: nn.Module, loss: Tensor, backward: Callable[[Tensor], None]) -> None:
        """Do a manual backward pass: `backward(loss)`."""
        backward(loss)

    @abstractmethod
    def sync_manual(self, module: nn.Module, batch_idx: int, call: int) -> None:
        """Synchronise the gradients that a manual backward pass has left: the `call`-th of this batch, from 0.

        Raises:
            DisagreementError: Other workers are at another one.
        """

    def end_manual(self, batch_idx: int) -> None:  # noqa: B027
        """A chunk of manual optimization is through, with this batch: see that nobody waits in `sync_manual`."""

    def may_skip_alone(self, module: nn.Module) -> bool:
        """Whether a worker may leave out a training step that others take: nobody would wait for it."""
        return True

    def end_backward(self, module: nn.Module) -> None:  # noqa: B027
        """An automatic backward pass is done."""

    def refresh(self, module: nn.Module) -> None:  # noqa: B027
        """Parameters have been changed, or are to be looked at, outside of a pass: forget copies of them."""

    def agree_on_infinities(self, found: Iterable[Tensor]) -> None:
        """Make numbers that are non-zero on any worker non-zero on all."""
        return None

    def clip_gradients(self, parameters: Iterable[Tensor], value: float, algorithm: str) -> None:
        """Clip gradients by their total norm over all workers that hold parts of it ("norm"), or each ("value")."""
        clip_whole_gradients(parameters, value, algorithm)

    # ---------------------------------------------------------------- evaluation

    def begin_evaluation(self, module: nn.Module, within_fit: bool) -> None:
        """Before an evaluation's first hook, on every worker."""
        if within_fit:
            self.sync_buffers(module)

    def evaluation_step(self, module: nn.Module, step: Step) -> Step:
        """The step to call for each batch."""
        return step

    def begin_round(self, module: nn.Module, has_batch: bool, computes: bool) -> bool:
        """This worker has a batch, or has none left; return whether any worker has one.

        Where workers must compute together, one that has none, or one of which nothing is to be computed (it is None),
        takes part in what the others compute, without code of the user's.
        """
        return has_batch

    def end_round(self, module: nn.Module) -> None:  # noqa: B027
        """This worker has evaluated its batch."""

    def end_evaluation(self, module: nn.Module) -> None:  # noqa: B027
        """After an evaluation's last hook, on every worker."""

    @abstractmethod
    def sync_buffers(self, module: nn.Module) -> None:
        """Give every worker the buffers of rank 0 (running statistics), so that all evaluate one and the same model."""

    # ---------------------------------------------------------------- state

    def holds_common(self, replica: bool) -> bool:
        """Whether this worker gives what all have in common to a checkpoint: rank 0, or a second node's replica."""
        ranks = self.ranks
        return ranks.rank == 0 or (replica and ranks.node_rank == 1 and ranks.local_rank == 0)

    def own_part(self, state: dict[str, Any], replica: bool) -> dict[str, Any]:
        """What this worker gives of a state that has been gathered from what it holds."""
        return state

    def take_up(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's state as this worker can use it; what is in pieces is put together."""
        return whole_state(state)

    def accumulated(self, module: nn.Module) -> dict[str, Tensor]:
        """Gradients that wait for the batch that ends an accumulation, by names of parameters."""
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    def put_accumulated(self, module: nn.Module, gradients: Mapping[str, Tensor]) -> None:
        """The reverse; copies are made."""
        for name, parameter in module.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device, copy=True)

    def own_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """What differs from worker to worker in the module itself, by its names in the state dict."""
        return {}

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        """The module's state as a checkpoint has it; live tensors."""
        state: dict[str, Any] = module.state_dict()
        return require_state(module, state)

    def load_module(self, module: nn.Module, state: Mapping[str, Any], strict: bool) -> None:
        """The reverse of `module_state`.

        Raises:
            CheckpointError: It does not fit the module.
        """
        load_into(module, state, strict)

    def optimizer_state(self, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state as a checkpoint has it; live tensors."""
        return optimizer.state_dict()

    def load_optimizer(self, module: nn.Module, optimizer: Optimizer, state: dict[str, Any], as_saved: bool) -> None:
        """The reverse of `optimizer_state`; `state` may be kept. `as_saved`: see `load_optimizer_state`."""
        load_optimizer_state(optimizer, state, as_saved)

    def averaged_tensors(self, module: nn.Module, buffers: bool) -> dict[str, Tensor]:
        """Parameters (and `buffers`) by every name they have, as this worker holds them: to be copied and changed."""
        named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        return named | dict(module.named_buffers(remove_duplicate=False)) if buffers else named

    def local_part(self, tensor: Tensor) -> Tensor:
        """What this worker has of one of them; shares its memory."""
        return tensor

    def as_held(self, value: Any, like: Tensor) -> Tensor:
        """A tensor of a checkpoint's state in the form in which this worker holds `like`."""
        return value  # type: ignore[no-any-return]

    def home_state(self, module: nn.Module) -> dict[str, Any] | None:
        """What the driver's module takes up when training is over: whole, in main memory, from one worker.

        None on others, and where it is too large to come home.
        """
        state = self.module_state(module)
        return {name: to_cpu(tensor) for name, tensor in state.items()} if self.ranks.rank == 0 else None

    @abstractmethod
    def all_agree(self, flag: bool) -> bool:
        """Whether `flag` is true on every worker."""

    @abstractmethod
    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        """Tensors of all workers, stacked in a new first dimension."""

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any] | None:
        """On rank 0 every worker's `value`, by rank; None on others. It is pickled, and should be in main memory."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until all workers are here."""
