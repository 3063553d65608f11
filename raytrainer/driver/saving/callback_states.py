"""The states of the driver's callbacks, copied when they are taken: what a callback does next must not change them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from raytrainer.callbacks import Callback
from raytrainer.errors import CheckpointError
from raytrainer.stateful_callback import StatefulCallback

__all__ = ["own_copy", "put_back", "states_of", "tensors_in", "without_owner"]


def states_of(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """The callbacks' states, by key.

    Raises:
        CheckpointError: One cannot be copied; names the callback.
    """
    states = {}
    for callback in callbacks:
        state = callback.state_dict()
        try:
            states[callback.state_key] = own_copy(state)
        except Exception as error:
            raise CheckpointError(
                f"the state of the callback {callback.state_key} cannot be copied: {type(error).__name__}: {error}. "
                "Its state_dict() must give numbers, strings, tensors and containers that nothing else changes."
            ) from error
    return states


def put_back(callbacks: Sequence[Callback], states: Mapping[str, Any]) -> None:
    """Have the callbacks take up their states; `states` stay theirs alone, to be taken up once more."""
    for callback in callbacks:
        if callback.state_key in states:
            callback.load_state_dict(own_copy(states[callback.state_key]))


def without_owner(checkpoint: Mapping[str, Any], callbacks: Iterable[StatefulCallback]) -> list[str]:
    """The keys of states in a checkpoint that none of the callbacks takes up."""
    keys = {callback.state_key for callback in callbacks}
    states = [*(checkpoint.get("callbacks") or {}).items(), *(checkpoint.get("worker_callbacks") or {}).items()]
    return [key for key, state in states if state and key not in keys]


def own_copy(value: Any, keep: Iterable[Tensor] = ()) -> Any:
    """A copy that shares nothing with `value` but the tensors in `keep`."""
    memo = {id(tensor): tensor for tensor in keep}
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a tensor in the midst of a graph, say, or an object that cannot be copied
        return _walk(value, memo)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def _walk(value: Any, memo: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return memo.get(id(value), value.detach().clone())
    if isinstance(value, Mapping):
        return {key: _walk(item, memo) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_walk(item, memo) for item in value]
        return items if isinstance(value, list) else tuple(items)
    try:
        return copy.deepcopy(value)
    except Exception:  # whether it can be stored is for the checkpoint to find out
        return value
