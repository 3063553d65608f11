"""precision="float8": linear layers whose matrix products are in float8, by torchao, in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytrainer.errors import ConfigurationError
from raytrainer.extras import not_installed
from raytrainer.plan.folding import few

__all__ = ["to_float8"]

#: What both sizes of a layer, and the number of rows that it is given, must be multiples of on GPUs.
_MULTIPLE = 16


def to_float8(module: nn.Module, device: torch.device) -> tuple[str, Callable[[], None]]:
    """Have the module's linear layers multiply in float8, with one scale for each tensor, found anew each time.

    Layers stay the objects that they are, with their parameters and hooks; only their class is another, and what is
    returned gives them back their own. Left out are the last layer and what gives a model of transformers its output,
    layers with sizes that are no multiples of 16, and those of classes derived from `nn.Linear`, which may compute
    something else.

    Args:
        module: Built, anywhere.
        device: Where it will be trained. On a CPU the products are emulated: in the numbers of float8, but slowly.

    Returns:
        A line that says what was done, and what undoes it.

    Raises:
        ConfigurationError: torchao is missing, the device has no float8, or no layer fits.
    """
    emulated = device.type != "cuda"
    _refuse_device(device)
    kind = _layer_kind(emulated)
    layers = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    why_not = _left_out(module, layers)
    chosen = [layer for name, layer in layers.items() if name not in why_not]
    if not chosen:
        found = few([f"{name} ({why})" for name, why in why_not.items()], 4) or "there is none"
        raise ConfigurationError(
            f'precision="float8": no linear layer of {type(module).__name__} can multiply in float8: {found}. Give '
            f'layers sizes that are multiples of {_MULTIPLE}, or use precision="bf16-mixed".'
        )
    for layer in chosen:
        layer.__class__ = kind

    def undo() -> None:
        for layer in chosen:
            if type(layer) is kind:
                layer.__class__ = nn.Linear

    left = few([f"{name} ({why})" for name, why in why_not.items()], 4)
    return (
        f"float8: {len(chosen)} of {len(layers)} linear layers{f', without {left}' if left else ''}; all else as with "
        f"bf16-mixed{'; emulated on the CPU, to try it out: it is faster on GPUs only' if emulated else ''}"
    ), undo


def _refuse_device(device: torch.device) -> None:
    if device.type != "cuda" or torch.version.hip is not None:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ConfigurationError(
            f'precision="float8" on a {torch.cuda.get_device_name(device)}: GPUs multiply in float8 from compute '
            f"capability 8.9 on (Ada, Hopper, Blackwell), and this one has {capability[0]}.{capability[1]}; use "
            f'precision="bf16-mixed".'
        )


def _left_out(module: nn.Module, layers: dict[str, nn.Linear]) -> dict[str, str]:
    """Names of layers that stay as they are, and why."""
    outputs: dict[int, str] = {}
    for part in module.modules():
        ask = getattr(part, "get_output_embeddings", None)
        if callable(ask):
            outputs[id(ask())] = "the model's output"
    if layers:
        outputs.setdefault(id(list(layers.values())[-1]), "the last")
    holders: dict[int, int] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    reasons = {}
    for name, layer in layers.items():
        if id(layer) in outputs:
            reasons[name] = outputs[id(layer)]
        elif type(layer) is not nn.Linear:
            reasons[name] = f"a {type(layer).__name__}"
        elif layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
            reasons[name] = f"{layer.in_features} to {layer.out_features}"
        elif holders[id(layer.weight)] > 1:
            reasons[name] = "its weight is another module's too"
    return reasons


@cache
def _layer_kind(emulated: bool) -> type[nn.Linear]:
    """The class of a layer in float8: torchao's, which keeps its settings in each layer, with these in the class."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        instead = 'use precision="bf16-mixed"'
        raise not_installed(
            'precision="float8"', "torchao", "float8", instead, where=" in the environment of the workers"
        ) from error
    plain = nn.Linear(_MULTIPLE, _MULTIPLE, device="meta")
    # Any: the checker knows no class that is found at run time
    theirs: Any = convert_to_float8_training(plain, config=Float8LinearConfig(emulate=emulated))
    base: Any = type(theirs)
    settings = {name: value for name, value in vars(theirs).items() if name not in vars(plain)}

    def forward(self: Any, input: Tensor) -> Tensor:
        if emulated and torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))  # as torchao does it on GPUs
        rows = input.numel() // max(1, input.size(-1))
        if rows % _MULTIPLE == 0 and rows:
            return base.forward(self, input)  # type: ignore[no-any-return]
        # GPUs refuse another number of rows, which an epoch's last batch may have; zeros change no scale
        missing = -rows % _MULTIPLE or _MULTIPLE
        output: Tensor = base.forward(self, F.pad(input.reshape(rows, input.size(-1)), (0, 0, 0, missing)))
        return output[:rows].reshape(*input.shape[:-1], output.size(-1))

    def reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles, which may outlive the run, are of the user's class."""
        return _new_linear, (), vars(self)

    own = {"forward": forward, "__reduce_ex__": reduced, "__module__": base.__module__}
    return type("Float8Linear", (base,), settings | own)


def _new_linear() -> nn.Linear:
    """One that gets its state from a copy or a pickle."""
    return nn.Linear.__new__(nn.Linear)
