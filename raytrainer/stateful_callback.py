"""What both kinds of callback share."""

from __future__ import annotations

from typing import Any

from raytrainer.short_repr import ShortRepr

__all__ = ["StatefulCallback"]


class StatefulCallback(ShortRepr):
    """A key and a state that travel in checkpoints."""

    @property
    def state_key(self) -> str:
        """The name under which this callback's state is stored in a checkpoint; unique within a run."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """State to put into a checkpoint: plain values and tensors only."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
