"""One worker: every collective is the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor, nn

from raytrainer.data.sharding import Share
from raytrainer.strategies.strategy import Strategy

__all__ = ["SingleStrategy"]


@final
class SingleStrategy(Strategy):
    """Training in one process, on one device."""

    @property
    def share(self) -> Share:
        return Share(0, 1)

    def prepare(self, module: nn.Module, step: Callable[[Any, int, int], Any]) -> Callable[[Any, int, int], Any]:
        return step

    def sync_next(self, sync: bool) -> None:
        pass

    def sync_manual(self, module: nn.Module, batch_idx: int, call: int) -> None:
        pass

    def sync_buffers(self, module: nn.Module) -> None:
        pass

    def all_agree(self, flag: bool) -> bool:
        return flag

    def all_gather(self, tensor: Tensor, sync_grads: bool = False) -> Tensor:
        return (tensor if sync_grads else tensor.detach()).unsqueeze(0)

    def gather_objects(self, value: Any) -> list[Any] | None:
        return [value]

    def barrier(self) -> None:
        pass
