"""Tensors that an evaluation made in inference mode, and that training then uses: who they are, and what to do."""

from __future__ import annotations

from torch import nn

from raytrainer.attribute_tensors import attribute_tensors
from raytrainer.errors import ConfigurationError

__all__ = ["explain_inference_tensor"]


def explain_inference_tensor(error: BaseException, module: nn.Module) -> ConfigurationError | None:
    """What torch's complaint about inference tensors means here; None: it is about something else."""
    if not isinstance(error, RuntimeError) or isinstance(error, ConfigurationError):
        return None
    if "inference tensor" not in str(error).lower():
        return None
    names = list(dict.fromkeys(name for name, tensor in attribute_tensors(module) if tensor.is_inference()))
    found = f"self.{', self.'.join(names[:5])}" if names else "a tensor"
    return ConfigurationError(
        f"{type(module).__name__} uses {found} for training, made in an evaluation, which runs in inference mode: "
        f"such tensors know nothing of gradients. Use Trainer(inference_mode=False), or make what is kept in __init__, "
        f"configure_model or a training step. torch says: {error}"
    )
