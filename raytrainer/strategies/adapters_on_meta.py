"""How adapters of PEFT begin in a module that is made on the meta device: as PEFT has them, or they are refused.

A LoRA adds nothing at first, since one of its two factors is zero. Both are plain linear layers, whose own
initialisation would make noise of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from raytrainer.errors import ConfigurationError

__all__ = ["adapters_of", "initialise_adapters"]

#: What `init_lora_weights` may be: others are computed from weights that are not there yet.
_STARTS = (True, False, "gaussian")


def adapters_of(root: nn.Module) -> dict[str, Any]:
    """The adapters of a whole module: PEFT's configurations by name."""
    found: dict[str, Any] = {}
    for part in root.modules():
        configs = getattr(part, "peft_config", None)
        if isinstance(configs, dict):
            found |= configs
    return found


def initialise_adapters(configs: Mapping[str, Any], inside: Iterable[nn.Module], made: set[int]) -> None:
    """Give the adapters' weights their first values.

    Args:
        configs: See `adapters_of`.
        inside: Parts of the module.
        made: Ids of those that have just been given memory.

    Raises:
        ConfigurationError: They begin with what is not known here.
    """
    for name, config in configs.items():
        _refuse(name, config)
    for layer in inside:
        reset = getattr(layer, "reset_lora_parameters", None)
        if not callable(reset):
            continue
        for name in dict.fromkeys([*_held(layer, "lora_A"), *_held(layer, "lora_embedding_A")]):
            new = name in _held(layer, "lora_A") and id(layer.lora_A[name]) in made  # type: ignore[index]
            if name in configs and (new or id(getattr(layer, "lora_embedding_A", None)) in made):
                reset(name, configs[name].init_lora_weights)


def _held(layer: nn.Module, name: str) -> list[str]:
    return list(getattr(layer, name, ()))


def _refuse(name: str, config: Any) -> None:
    kind = getattr(config, "peft_type", None)
    kind = str(getattr(kind, "value", kind))
    if kind != "LORA":
        what = f"is of the type {kind}"
    elif getattr(config, "init_lora_weights", True) not in _STARTS:
        what = f"begins with init_lora_weights={config.init_lora_weights!r}, which is computed from other weights"
    elif getattr(config, "modules_to_save", None):
        what = f"has modules_to_save={config.modules_to_save!r}, which begin as copies of other modules"
    else:
        return
    raise ConfigurationError(
        f"a module made with on_meta: PEFT's adapter {name!r} {what}. What is made in the workers are LoRAs with "
        f"init_lora_weights=True, 'gaussian' or False, without modules_to_save; make others here, without on_meta."
    )
