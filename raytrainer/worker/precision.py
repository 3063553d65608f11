"""What a precision does to the module, to its inputs, and to a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raytrainer.data.transfer import cast_floating
from raytrainer.errors import ConfigurationError

__all__ = ["Precision"]

_TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
_MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class Precision:
    """One of "32-true", "64-true", "16-true", "bf16-true" (everything in that type) or a "-mixed" one (autocast).

    Mixed fp16 scales the loss (`torch.amp.GradScaler`), so that small gradients survive.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.dtype = _TRUE.get(name)
        self.autocast_dtype = _MIXED.get(name)
        self.scaler: torch.amp.GradScaler | None = None
        if name == "16-mixed":
            if device.type == "cpu":
                raise ConfigurationError('precision="16-mixed" needs a GPU; on CPUs use "bf16-mixed" or 32.')
            self.scaler = torch.amp.GradScaler(device.type)

    def convert_module(self, module: nn.Module) -> None:
        """Cast parameters and floating-point buffers, where the whole module has one type."""
        if self.dtype is not None:
            module.to(self.dtype)

    @property
    def convert_input(self) -> Callable[[Any], Any] | None:
        """What to do to a batch before it is used; None: nothing."""
        dtype = self.dtype
        return None if dtype is None else lambda batch: cast_floating(batch, dtype)

    @property
    def plain(self) -> bool:
        """Whether steps run as they are, without any context."""
        return self.dtype is None and self.autocast_dtype is None

    @contextmanager
    def context(self) -> Iterator[None]:
        """The context of a step: autocast, or a default dtype for the tensors that the user makes in it."""
        if self.autocast_dtype is not None:
            with torch.autocast(self.device.type, dtype=self.autocast_dtype):
                yield
        elif self.dtype is not None:
            default = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(default)
        else:
            yield

    def scale(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step with a gradient already unscaled. False if it was skipped for infinite gradients."""
        if self.scaler is None:
            optimizer.step()
            return True
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
