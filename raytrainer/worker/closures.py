"""Which optimizers are given a closure: those that may evaluate the loss on their own account."""

from __future__ import annotations

import inspect
from enum import Enum

from torch.optim import Optimizer

__all__ = ["Closure", "takes_closure"]


class Closure(Enum):
    """What an optimizer's `step` does with a closure.

    NEVER: `step` takes none, or calls it once, first of all, as those of torch.optim do: so it may as well be called
    before. OPTIONAL: somebody else's, that may call it as often as it likes. REQUIRED: it does not work without, since
    it evaluates several times.
    """

    NEVER = "never"
    OPTIONAL = "optional"
    REQUIRED = "required"


def takes_closure(optimizer: Optimizer) -> Closure:
    """What an optimizer's `step` does with a closure, by its signature and by where it comes from.

    A `step(*args, **kwargs)` passes on what it is given: so a class that it derives from may say more.
    """
    passes_on = False
    for step in (vars(kind)["step"] for kind in type(optimizer).__mro__ if "step" in vars(kind)):
        parameters = inspect.signature(step).parameters
        closure = parameters.get("closure")
        if closure is None and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            passes_on = True
            continue
        if closure is not None and closure.default is inspect.Parameter.empty:
            return Closure.REQUIRED
        ours = closure is None or (getattr(step, "__module__", None) or "").startswith("torch.optim.")
        return Closure.NEVER if ours and not passes_on else Closure.OPTIONAL
    return Closure.OPTIONAL if passes_on else Closure.NEVER
