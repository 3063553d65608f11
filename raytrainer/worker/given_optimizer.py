"""`GivenOptimizer`: what user code is given for each optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.optim import Optimizer

from raytrainer.module import Module

__all__ = ["GivenOptimizer", "inner_optimizer"]


class GivenOptimizer:
    """Stands for an optimizer in user code. All that is not said here is the optimizer's own, `isinstance` included.

    Args:
        optimizer: The optimizer.
        module: The module that trains, for `toggle_model`; None where nobody asks for that.
        unsynchronised: A context in which `manual_backward` leaves gradients as this worker has computed them.
        common: Makes of a closure one that returns the same on all workers.

    Attributes:
        optimizer: torch's own object.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        module: Module | None = None,
        unsynchronised: Callable[[], AbstractContextManager[None]] = nullcontext,
        common: Callable[[Callable[[], Any]], Callable[[], Any]] = lambda closure: closure,
    ) -> None:
        self.__dict__.update(optimizer=optimizer, _module=module, _unsynchronised=unsynchronised, _common=common)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Make a step; the optimizer runs the closure, if there is one.

        Over several workers, an optimizer that may evaluate several times is given the mean of their losses, so that
        all take the same decisions by it.
        """
        own: Any = self.__dict__["optimizer"]
        return own.step(**kwargs) if closure is None else own.step(closure=self.__dict__["_common"](closure), **kwargs)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Within, only this optimizer's parameters require gradients.

        Args:
            sync_grad: Whether `manual_backward` averages gradients over workers in it. False: for all backward passes
                but the last one before a step, which accumulate.
        """
        own = self.__dict__
        module: Module = own["_module"]
        module.toggle_optimizer(own["optimizer"])
        try:
            with nullcontext() if sync_grad else own["_unsynchronised"]():
                yield
        finally:
            module.untoggle_optimizer(own["optimizer"])

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.__dict__["optimizer"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "step":  # schedulers put a function that calls the former one in its place
            self.__dict__["step"] = value
        else:
            setattr(self.__dict__["optimizer"], name, value)

    def __repr__(self) -> str:
        return repr(self.__dict__["optimizer"])

    def __reduce__(self) -> Any:
        # a copy is one of torch's own object
        return _itself, (self.__dict__["optimizer"],)


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """torch's own object for one that may be a stand-in."""
    kind: type = type(optimizer)  # isinstance would be told the inner one's
    return optimizer.__dict__["optimizer"] if issubclass(kind, GivenOptimizer) else optimizer  # type: ignore[no-any-return]


def _itself(optimizer: Optimizer) -> Optimizer:
    return optimizer
