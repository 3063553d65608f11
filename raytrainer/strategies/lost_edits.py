"""Changes of parameters that would be lost: made while they are gathered, in place of on the shards.

What is in no block is gathered for a whole training step. A step that changes such parameters (the momentum encoder of
MoCo, clipped weights) changes a copy that is dropped at the step's end.
"""

from __future__ import annotations

from torch import Tensor, nn

from raytrainer.errors import ConfigurationError
from raytrainer.private.fsdp_private import edited_while_gathered, is_gathered
from raytrainer.strategies.strategy import Step
from raytrainer.strategies.written_copies import WrittenCopies

__all__ = ["LostEdits", "refuse_lost_edits"]

#: Steps are looked at that are a power of two up to this, and then each so many: a look waits for a GPU.
_SELDOM = 256


class LostEdits:
    """Looks for them in a module, now and then: an average of equal weights changes nothing at first.

    Args:
        root: The module.
        compiled: Whether blocks are compiled, which is not to be looked into.
    """

    def __init__(self, root: nn.Module, compiled: bool) -> None:
        self._root, self._compiled = root, compiled
        self._copies = WrittenCopies(root)
        self._copies.watch_gradients_hooks()
        self._steps = 0
        self._behind = False

    def begin_step(self) -> None:
        """A training step begins."""
        self._steps += 1
        self._behind = False

    def watched(self, step: Step) -> Step:
        """`step`, looked into when it is time to: what is in blocks is in shards, of which parts are copies."""
        if self._compiled:
            return step
        watching = self._copies.watched("training_step", step)
        return lambda *args: (watching if self._is_due else step)(*args)

    def stepped(self) -> None:
        """An optimizer has changed shards: what is gathered now is what they were before."""
        self._behind = self._behind or is_gathered(self._root)

    def look_before_backward(self, loss: Tensor) -> None:
        """`look` when the backward pass of this loss begins, after the hooks that come before it."""
        if self._is_due and loss.requires_grad:
            loss.register_hook(lambda gradient: self.look("training_step, or a hook before the backward pass,"))

    @property
    def _is_due(self) -> bool:
        steps = self._steps
        return not steps % _SELDOM or (steps < _SELDOM and not steps & (steps - 1))

    def look(self, where: str = "training_step") -> None:
        """Look, if it is time to.

        Raises:
            ConfigurationError: A parameter was changed.
        """
        if self._is_due and not self._behind:
            refuse_lost_edits(self._root, where)


def refuse_lost_edits(root: nn.Module, where: str) -> None:
    """Refuse parameters that were changed since they were gathered, if they still are.

    Raises:
        ConfigurationError: Names them, and `where` it was.
    """
    names = edited_while_gathered(root) if is_gathered(root) else []
    if names:
        shown = ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" * (len(names) > 3))
        raise ConfigurationError(
            f"{where} has changed {shown}. With fsdp what is in no block is whole during a step, and such a change "
            f"of it is lost at the step's end. Change parameters in on_train_batch_start or on_train_batch_end, "
            f"where they are shards, or name the modules that have them as blocks: FSDP(blocks=[...])."
        )
