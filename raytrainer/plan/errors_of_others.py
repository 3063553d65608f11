"""Errors of other libraries in the user's code whose own words do not say what to do here."""

from __future__ import annotations

import re

from raytrainer.plan.names_elsewhere import EXPORTED

__all__ = ["advice", "says_loader_died"]


def says_loader_died(error: BaseException) -> bool:
    """Whether torch tells that a loader's process has died, which it does in the midst of whatever else is done."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def advice(message: str) -> str:
    """What to do about an error, by its message; "" where that says enough."""
    if found := re.search(r"`(\w+)` cannot be used outside of a Ray Train", message):
        here = EXPORTED.get(found[1])
        meant = f"ray.train.{found[1]} knows of ray.train's trainers alone." + (
            f" Here that is {here}." if here else ""
        )
        return f"{meant} examples/guide/from-ray-train.md has each by its name."
    if re.search(r"dtype|scalar type", message) and {"Double", "Float"} <= set(re.findall(r"\w+", message)):
        return (
            "One of the two is float64, as NumPy and pandas make it: batch.float(), dtypes=torch.float32 of a "
            "RayDataset, or Trainer(precision=64)."
        )
    if re.search(r"KeyError: '(LOCAL_)?(RANK|WORLD_SIZE)'|^'(LOCAL_)?(RANK|WORLD_SIZE)'$", message):
        return (
            "No variables of torchrun's are set: raytrainer.rank() and raytrainer.world_size() work everywhere, "
            "self.local_rank in a Module."
        )
    if "backward through the graph a second time" in message:
        return (
            "The Trainer calls backward() on the loss that training_step returns: leave it out there, or set "
            "self.automatic_optimization = False and use self.manual_backward(loss). Or a tensor that an earlier batch "
            "has left is used again: keep tensor.detach()."
        )
    if re.search(r"has no attribute 'trainer'$", message.strip()):
        return "Modules and DataModules have a self.trainer; elsewhere there are raytrainer.rank() and world_size()."
    return ""
