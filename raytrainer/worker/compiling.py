"""`torch.compile`, in place: parameters keep their names, and the module stays the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from raytrainer.module import Module
from raytrainer.private.torch_private import compile_call, drop_compiled, is_compiled

__all__ = ["compile_module", "parts_to_compile"]


def parts_to_compile(module: Module) -> list[nn.Module]:
    """What a step may call: the module itself, if it has a `forward`, and its direct children with parameters.

    So `self(x)` and `self.model(x)` in a step are both compiled, the latter as one who writes
    `model = torch.compile(model)` would have it. Compiled code that is called within compiled code becomes part of it.
    The step itself stays plain Python, in which `self.log` and the like cost no graph break. Members of a `ModuleList`
    or `ModuleDict` count as children, since containers are never called; what has no parameters (losses, metrics) stays
    as it is; what the user has compiled is left alone.
    """
    own = [module] if type(module).forward is not nn.Module.forward else []
    children: list[nn.Module] = []
    for child in module.children():
        children += child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
    parts = [*own, *(child for child in children if any(True for _ in child.parameters()))]
    return [part for part in parts if not is_compiled(part)]


def compile_module(module: Module, options: dict[str, Any]) -> Callable[[], None]:
    """Compile the module's parts on their first call; return what undoes it.

    Args:
        module: The module, built and on its device.
        options: Of torch.compile.
    """
    parts = parts_to_compile(module)
    for part in parts:
        _compile(part, options)

    def undo() -> None:
        for part in parts:
            drop_compiled(part)

    return undo


def _compile(part: nn.Module, options: dict[str, Any]) -> None:
    if not type(part).forward.__module__.startswith("torch."):
        part.compile(**options)
        return
    compile_call(part, options)
