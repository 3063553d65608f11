"""What FSDP's workers do together, watched: so that one that has nothing to compute takes part all the same.

Each gathering of a module's parameters, and each reduction of its gradients, needs all workers that hold shards of it.
Two things leave a worker without a reason to: it has no batch left in an evaluation, or it skips a batch in training.

In an evaluation workers agree, batch by batch, on who has one to compute. While some have none, the first that has one
tells them what it gathers; they gather it with it and drop it. They run no code of the user's.

Where all have one, and in training, nothing is told from step to step (`collective_order.py`). In training a worker
that skips a batch does what its latest step did, from the point that it has got to, with zeros for gradients. In the
first step, of which there is no record yet, workers tell the group's store what they do, and one that skips reads it
there.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from raytrainer.errors import RaytrainerError
from raytrainer.private.fsdp_private import drop_gathered, is_gathered, reduce_zeros, wind_up_backward
from raytrainer.strategies.collective_order import END, EVALUATION, NO_MODULE, CollectiveOrder, Event

__all__ = ["Gatherings"]

# torch 2.13 has given them other names
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gatherings:
    """Watches the collectives of one sharded module.

    Args:
        root: The whole, of which `fully_shard` has been called.
        group: The workers that hold one copy of the shards.
        store: A store that they share.
        device: This worker's.
        control: A gloo group of all workers.
        timeout: Seconds that a collective waits for the others.
    """

    def __init__(
        self, root: nn.Module, group: Any, store: Any, device: torch.device, control: Any, timeout: float
    ) -> None:
        self.root, self._group, self._device, self._control = root, group, device, control
        named: dict[str, Any] = {name: part for name, part in root.named_modules() if isinstance(part, FSDPModule)}
        self.modules: list[Any] = list(named.values())
        self._members = dist.get_process_group_ranks(group)
        name = [uuid.uuid4().hex if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(name, src=0, group=control)  # what the store has of earlier modules stays theirs
        self._order = CollectiveOrder(store, f"raytrainer/{name[0]}", list(named), timeout)
        self._leader: int | None = None  # of an evaluation's round in which somebody has no batch
        self._watching = False
        self._all_compute = False  # in the latest round
        self._kind: Any = True
        for index, part in enumerate(self.modules):
            part.set_custom_all_gather(_Gather(self, index))  # type: ignore[arg-type]
            part.set_custom_reduce_scatter(_Reduce(self, index))  # type: ignore[arg-type]

    @property
    def several(self) -> bool:
        """Whether shards are on several workers."""
        return len(self._members) > 1

    # ---------------------------------------------------------------- training

    def forget(self) -> None:
        """What is trained has changed: the next step of each kind is told again."""
        self._order.forget()

    def keep(self, gathered: bool) -> None:
        """Whether a backward pass leaves parameters gathered.

        A step may have passes of its own (`torch.autograd.grad`, for a penalty on gradients), after which the loss's
        needs the same weights again.
        """
        for part in self.modules:
            part.set_reshard_after_backward(not gathered, recurse=False)

    def begin_step(self, kind: Any) -> None:
        """A training step begins; of automatic ones, `kind` says whether the backward pass averages gradients."""
        self._watching = self.several
        if self._watching:
            self._kind = kind
            self._order.begin(kind)

    def end_step(self) -> None:
        """Its backward pass is done."""
        if self._watching:
            self._watching = False
            self._order.end()

    def renew(self, within_step: bool) -> None:
        """An optimizer has changed shards: what is gathered now is what they were before.

        Args:
            within_step: Whether this may be in the midst of a training step, which goes on with what is in no block.
        """
        root: Any = self.root
        again = within_step and is_gathered(root)
        for part in self.modules:
            drop_gathered(part)
        if again:
            root.unshard()

    def skip_step(self, nothing: bool) -> bool:
        """This worker has no loss for this step; take part in what the others do for theirs.

        Args:
            nothing: Whether it has no gradient to give in a step that reduces, of earlier batches neither.

        Returns:
            Whether that is so for all workers.

        Raises:
            RaytrainerError: What this worker has done so far in the step is not what it does in others.
        """
        if not self._watching:
            wind_up_backward(self.root)
            return nothing
        order = self._order
        if nothing:
            order.count("nothing")
        known = order.expected
        if known is not None:
            for event in known[len(order.happened) :]:
                self._take_part(event)
            somebody = True
        else:
            somebody = self._follow()
        if not somebody:
            self._watching = False  # what such a step does is still unknown
            if self._kind:
                self._reduce_all()
        wind_up_backward(self.root)
        if somebody:
            self.end_step()
        if not nothing:
            return False
        # all have told by now: they have come as far as the reduction
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return order.count("nothing", 0) == dist.get_world_size()

    def _reduce_all(self) -> None:
        """All workers skip a step of which there is no record: reduce what earlier batches have left, in any order."""
        for module in self.modules:
            module.reshard()
            module.unshard()
            module.reshard()
        for module in self.modules:
            reduce_zeros(module)

    def _follow(self) -> bool:
        """Do what the others do in this step, as they tell the store; return whether any of them has gradients."""
        # who comes last of those that skip ends it, if nobody is left
        if self._order.count("skipped") == dist.get_world_size():
            self._order.nobody()
        while not isinstance(word := self._order.next_word(), str):
            self._take_part(word)
        return word == END

    def _take_part(self, event: Event) -> None:
        what, index, _ = event
        order = self._order
        if index == NO_MODULE:
            raise order.left_out(event)
        position = len(order.happened)
        module: Any = self.modules[index]
        if what == "gather":
            module.reshard()  # what comes first in a step need not be the first that this worker has of it
            module.unshard()
            module.reshard()
        else:
            reduce_zeros(module)
        if order.happened[position:] != [event]:
            raise RaytrainerError(
                f"a worker that skips a batch cannot do what the others do: {event}, not {order.happened[position:]}; "
                f"with fsdp, training_step may return None only where each parameter that trains is used in each step, "
                f"and reshard_after_forward is no number."
            )

    def note(self, what: str, index: int, numbers: int) -> None:
        """This worker is about to do something that needs the others."""
        if self._leader is not None:
            self._announce(index)
        if self._watching:
            self._order.note((what, index, numbers))

    def together(self, what: str) -> None:
        """This worker is about to do, in a step, something else that needs the others."""
        if self._watching:
            self._order.note((what, NO_MODULE, 0))

    # ---------------------------------------------------------------- evaluation

    def begin_round(self, has_batch: bool, computes: bool) -> bool:
        """Agree on who has a batch, and computes; return whether anybody has one. Who does not compute then serves."""
        flags = [torch.zeros(1, dtype=torch.uint8) for _ in range(dist.get_world_size())]
        dist.all_gather(flags, torch.tensor([has_batch + computes], dtype=torch.uint8), group=self._control)
        found = [int(flag) for flag in flags]
        if not self._all_compute:  # in the round before: who served has dropped what others have kept gathered
            self.reshard()
        here = [rank for rank in self._members if found[rank] == 2]
        self._leader = here[0] if here and len(here) < len(self._members) else None
        self._all_compute = min(found) == 2
        return any(found)

    def begin_evaluation_step(self) -> None:
        """A step of an evaluation begins, which `end_step` ends."""
        self._watching = self.several and self._all_compute
        if self._watching:
            self._order.begin(EVALUATION)

    def end_round(self) -> None:
        """This worker has evaluated its batch."""
        if self._leader is not None:
            self._announce(-1)
            self._leader = None

    def serve(self) -> None:
        """Gather what others gather for their batch, until they are done with it."""
        if self._leader is None:  # nobody here has one
            return
        leader, self._leader = self._leader, None
        word = torch.zeros(1, dtype=torch.int64, device=self._device)
        while True:
            dist.broadcast(word, src=leader, group=self._group)
            index = int(word.item())
            if index < 0:
                return
            module: Any = self.modules[index]
            module.unshard()
            module.reshard()

    def _announce(self, index: int) -> None:
        assert self._leader is not None
        word = torch.tensor([index], device=self._device)
        dist.broadcast(word, src=self._leader, group=self._group)
        if self._leader != dist.get_rank() and int(word.item()) != index:
            raise self._order.not_as(self._leader, index, int(word.item()))

    def reshard(self) -> None:
        """Drop everything that is gathered."""
        for module in self.modules:
            module.reshard()


class _Buffers:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Buffers):
    """torch's way of gathering a module's parameters, noted."""

    def __init__(self, gatherings: Gatherings, index: int) -> None:
        self._gatherings, self._index = gatherings, index

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self._gatherings.note("gather", self._index, input_tensor.numel())
        return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _Reduce(_Buffers):
    """torch's way of reducing a module's gradients, noted."""

    def __init__(self, gatherings: Gatherings, index: int) -> None:
        self._gatherings, self._index = gatherings, index

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self._gatherings.note("reduce", self._index, input_tensor.numel())
        return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
