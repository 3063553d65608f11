"""Averages of a module's weights, and their exchange with the live ones; for the callbacks that average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raytrainer.strategies.strategy import Strategy

__all__ = ["AveragedWeights", "Many", "One", "of_all"]

One = Callable[[Tensor, Tensor, int], Tensor]
Many = Callable[[Sequence[Tensor], Sequence[Tensor], int], None]


def of_all(one: One) -> Many:
    """What changes all averages at once, from a function that returns one of them."""

    def each(averages: Sequence[Tensor], values: Sequence[Tensor], count: int) -> None:
        for average, value in zip(averages, values, strict=True):
            average.copy_(one(average, value, count))

    return each


class AveragedWeights:
    """Averages of the floating-point (and complex) parameters and, if asked for, saved buffers of a module.

    Args:
        module: On its device, with all its parameters; they must stay the same objects.
        strategy: Knows which tensors this worker holds of them.
        average: One of the `multi_avg_fn` of `torch.optim.swa_utils`: called with (averages, live values, number of
            values averaged so far), it changes the averages.
        use_buffers: Whether to average buffers; otherwise the module's are always the live ones.
        device: Where to keep the averages; None: on the module's device.

    Attributes:
        count: Values averaged so far.
    """

    def __init__(
        self,
        module: nn.Module,
        strategy: Strategy,
        average: Callable[..., Any],
        use_buffers: bool,
        device: torch.device | str | None = None,
    ) -> None:
        self._average, self._strategy, self._device = average, strategy, device
        self.count = 0
        self._swapped = False
        self._live: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}  # the averages; while they are in the module, the live values
        self._names: dict[str, str] = {}  # every saved name -> the first name of the same tensor
        named = strategy.averaged_tensors(module, use_buffers)
        saved, first = module.state_dict(keep_vars=True), dict[int, str]()
        for name, tensor in named.items():
            if name in saved and (tensor.is_floating_point() or tensor.is_complex()):
                self._names[name] = first.setdefault(id(tensor), name)
        self._live = {name: named[name] for name in first.values()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's values of now into the averages; the first ones are the averages."""
        if self.count == 0:
            self._kept = {
                name: tensor.detach().to(device=self._device, copy=True) for name, tensor in self._live.items()
            }
        elif self._kept:
            part = self._strategy.local_part  # averages are taken number by number
            kept, live = map(part, self._kept.values()), map(part, self._live.values())
            self._average(list(kept), [tensor.detach().to(device=self._device) for tensor in live], self.count)
        self.count += 1

    def swap(self, averages: bool) -> None:
        """Put the averages into the module, or back out of it, if they are not there already. In place."""
        if averages == self._swapped or not self.count:
            return
        # tensors made under inference mode, in which evaluation hooks run, could not be trained on
        with torch.inference_mode(False), torch.no_grad():
            for name, kept in self._kept.items():
                live = self._live[name]
                value = live.detach().clone()
                live.copy_(kept)
                kept.copy_(value)
        self._swapped = averages

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averages, by every name that a state dict has for them."""
        source = self._live if self._swapped else self._kept
        return {name: source[first].detach() for name, first in self._names.items()} if self.count else {}

    @property
    def current(self) -> dict[str, Tensor]:
        """The weights that are being trained."""
        source = self._kept if self._swapped else self._live
        return {name: tensor.detach() for name, tensor in source.items()}

    @torch.no_grad()
    def restore(self, averages: Mapping[str, Tensor], current: Mapping[str, Tensor], count: int) -> None:
        """Take both over, by first names, from a checkpoint; copies are made."""
        held = self._strategy.as_held
        self._kept = {
            name: held(averages[name], live).to(self._device or live.device, live.dtype, copy=True)
            for name, live in self._live.items()
        }
        for name, live in self._live.items():
            live.copy_(held(current[name], live))
        self.count, self._swapped = count, False
