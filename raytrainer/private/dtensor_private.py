"""Every private interface of torch's DTensor, and of what sees its operations, and what if it is gone.

All were seen in torch 2.13.0 (CPU) and 2.11.0 (CUDA). Each function says what it does without.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from raytrainer.errors import ConfigurationError

try:
    from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode as innermost_mode
except ImportError:

    class DispatchMode(contextlib.nullcontext[None]):  # type: ignore[no-redef]
        """Sees nothing: writes into copies of shards are lost, as they are in torch."""

    def innermost_mode() -> DispatchMode | None:
        """None is in use."""
        return None


__all__ = [
    "DispatchMode",
    "addresses_of",
    "find_anomalies_in_parts",
    "innermost_mode",
    "is_dropped",
    "memory_of",
    "place_of",
    "written_by",
]


def place_of(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of this worker's shard of a DTensor, and the index of the shard's first element in the whole.

    Without the function: an error.
    """
    try:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    except ImportError as error:
        version = torch.__version__
        raise ConfigurationError(
            f"This torch ({version}) does not let it be known which part of a tensor a worker has: {error}."
        ) from None
    shape, at = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(at)


def find_anomalies_in_parts() -> None:
    """Have torch's search for anomalies look at gradients of layers that are split, too: all of their workers do.

    torch has no rule for the operator that it asks (seen in 2.13.0). Where none can be given, it says so itself.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.experimental import register_sharding

        register_sharding(torch.ops.aten._is_any_true.default)(lambda x: [([Replicate()], [Replicate()])])


def written_by(operation: Any) -> list[tuple[int, str]]:
    """Which arguments an operation of a `DispatchMode` changes: place and name. Without `_schema`: none is known."""
    schema = getattr(operation, "_schema", None)
    arguments = enumerate([] if schema is None else schema.arguments)
    return [(place, each.name) for place, each in arguments if each.alias_info is not None and each.alias_info.is_write]


def memory_of(tensor: DTensor) -> Any:
    """A weak reference to the memory of this worker's part of a DTensor: `cdata` tells it, `expired()` if it is gone.

    None where it cannot be known.
    """
    try:
        from torch.multiprocessing.reductions import StorageWeakRef
    except ImportError:
        return None
    part = _held(tensor)
    return None if part is None else StorageWeakRef(part.untyped_storage())


def addresses_of(tensor: DTensor) -> range:
    """Where this worker's part of a DTensor is in its memory, which several may share; empty where it is not known."""
    part = _held(tensor)
    return range(0) if part is None else range(part.data_ptr(), part.data_ptr() + part.nbytes)


def _held(tensor: DTensor) -> Tensor | None:
    """This worker's part. What a collective is still to bring is in `elem` of what stands for it."""
    part = getattr(tensor, "_local_tensor", None)
    held: Tensor | None = getattr(part, "elem", part)
    return held


def is_dropped(view: Tensor) -> bool:
    """Whether a view alone has what it is a view of: no variable or attribute refers to that any more."""
    return _references(view) <= _OF_A_VIEW_ALONE


def _references(view: Tensor) -> int:
    return sys.getrefcount(view._base)


with torch.inference_mode(False):
    _OF_A_VIEW_ALONE = _references(torch.ones(2)[0])
