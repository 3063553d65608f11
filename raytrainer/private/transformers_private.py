"""What transformers keeps beside a model, and a model that comes to a worker by pickle has not.

Its models record router logits, hidden states and attentions by hooks, which they make when they are first asked for
these. What a class can record is in a registry, by the class's name, which `__init__` fills: a model whose class has
not been called in this process, or that `fully_shard` has given another class, records nothing, and says nothing (seen
in 5.24). Where this is gone, nothing is done.
"""

from __future__ import annotations

import importlib
import sys
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

__all__ = ["note_what_is_recorded", "reduce_recorder"]

_MODULE = "transformers.utils.output_capturing"


def note_what_is_recorded(module: nn.Module) -> None:
    """Have models within `module` record what they are asked for, as where they were made."""
    registry = getattr(sys.modules.get(_MODULE), "_CAN_RECORD_REGISTRY", None)
    if isinstance(registry, dict):
        for part in module.modules():
            if isinstance(recorded := getattr(part, "_can_record_outputs", None), dict):
                registry[part] = recorded


def reduce_recorder(value: Any) -> Any:
    """For a pickler: such a hook, within the module that it is of, of whose state a pickle would have a copy."""
    if not isinstance(value, FunctionType) or value.__module__ != _MODULE or "<locals>" not in value.__qualname__:
        return None
    closure = tuple(cell.cell_contents for cell in value.__closure__ or ())
    return _within_its_module, (value.__module__, value.__code__, value.__defaults__, closure)


def _within_its_module(name: str, code: CodeType, defaults: Any, closure: tuple[Any, ...]) -> FunctionType:
    module = importlib.import_module(name)
    return FunctionType(code, vars(module), code.co_name, defaults, tuple(map(CellType, closure)))
