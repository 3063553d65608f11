"""Changes of parameters that would be lost: made while they are gathered, in place of on the shards.

What is in no block is gathered for a whole training step. A step that changes such parameters (the momentum encoder of
MoCo, clipped weights) changes a copy that is dropped at the step's end; a block's forward pass that changes its own
changes one that is dropped at the pass's end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from raytrainer.errors import ConfigurationError
from raytrainer.plan.folding import few
from raytrainer.private.fsdp_private import edited_while_gathered, is_gathered
from raytrainer.strategies.strategy import Step
from raytrainer.strategies.written_copies import WrittenCopies

__all__ = ["LostEdits", "refuse_lost_edits", "watch_block"]

#: Steps are looked at that are a power of two up to this, and then each so many: a look waits for a GPU.
_SELDOM = 256


class LostEdits:
    """Looks for them in a module, now and then: an average of equal weights changes nothing at first.

    Args:
        root: The module.
        compiled: Whether blocks are compiled, which is not to be looked into.
    """

    def __init__(self, root: nn.Module, compiled: bool) -> None:
        self._root = root
        self._copies = WrittenCopies(root)
        # a backward pass within a step would be compiled while it is looked into
        self._watches = not compiled or bool(root.automatic_optimization)
        for block in root.modules():
            if compiled and isinstance(block, FSDPModule) and block is not root:
                self._copies.leave_alone(block)
        self._copies.watch_gradients_hooks()
        self._steps = 0

    def begin_step(self) -> None:
        """A training step begins."""
        self._steps += 1

    def watched(self, step: Step) -> Step:
        """`step`, looked into when it is time to: what is in blocks is in shards, of which parts are copies."""
        if not self._watches:
            return step
        watching = self._copies.watched("training_step", step)
        return lambda *args: (watching if self._is_due else step)(*args)

    def look_before_backward(self, loss: Tensor) -> None:
        """`look` when the backward pass of this loss begins, after the hooks that come before it."""
        if self._is_due and loss.requires_grad:
            loss.register_hook(lambda gradient: self.look("training_step, or a hook before the backward pass,"))

    @property
    def _is_due(self) -> bool:
        return _is_due(self._steps)

    def look(self, where: str = "training_step") -> None:
        """Look, if it is time to.

        Raises:
            ConfigurationError: A parameter was changed.
        """
        if self._is_due:
            refuse_lost_edits(self._root, where)


def _is_due(count: int) -> bool:
    return not count % _SELDOM or (count < _SELDOM and not count & (count - 1))


def watch_block(name: str, block: nn.Module) -> None:
    """Have a block's forward passes looked at, now and then, before what they have gathered is dropped."""
    passes = 0

    def look(*args: Any) -> None:
        nonlocal passes
        passes += 1
        if _is_due(passes) and (edited := edited_while_gathered(block)):
            raise ConfigurationError(
                f"the forward pass of {name!r} has changed {_shown(edited)}. With fsdp a block's parameters are whole "
                f"during its forward pass, and such a change of them is lost at its end. Change parameters in "
                f"on_train_batch_start or on_train_batch_end, where they are shards."
            )

    # not a part of a block that configure_model has compiled, hooks and all
    block.register_forward_hook(torch.compiler.disable(look), prepend=True)


def refuse_lost_edits(root: nn.Module, where: str) -> None:
    """Refuse parameters that were changed since they were gathered, if they still are.

    Raises:
        ConfigurationError: Names them, and `where` it was.
    """
    names = edited_while_gathered(root) if is_gathered(root) else []
    if names:
        raise ConfigurationError(
            f"{where} has changed {_shown(names)}. With fsdp what is in no block is whole during a step, and such a "
            f"change of it is lost at the step's end. Change parameters in on_train_batch_start or on_train_batch_end, "
            f"where they are shards, or name the modules that have them as blocks: FSDP(blocks=[...])."
        )


def _shown(names: list[str]) -> str:
    return few([repr(name) for name in names], 3)
