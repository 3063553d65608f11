"""Modules on their way to another process, also those that torch does not pickle: parametrized and scripted ones."""

from __future__ import annotations

import importlib
import io
import pickle
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ray
import torch
from ray import cloudpickle

from raytrainer.private.torch_private import reduce_parametrized
from raytrainer.private.transformers_private import reduce_recorder
from raytrainer.quick_imports import importing
from raytrainer.worker.actor.surroundings import Surroundings

__all__ = ["Pickled", "adopt", "dumps"]


@dataclass(frozen=True)
class Pickled:
    """What `dumps` made of something; for a worker, with the surroundings that it is to be unpickled in."""

    data: bytes
    surroundings: Surroundings | None = None

    def get(self) -> Any:
        """The thing itself, or rather a copy."""
        if self.surroundings is not None:
            adopt(self.surroundings)
        with importing():  # what the user's modules need, in a process that has just begun
            return pickle.loads(self.data)


_adopted: Surroundings | None = None  # by this process, latest


def adopt(surroundings: Surroundings) -> None:
    """Make them those of this worker's process, in place of the ones before."""
    global _adopted
    shipped = ray.get_runtime_context().runtime_env.get("working_dir")
    surroundings.adopt(_adopted, keep_folder=bool(shipped))
    _adopted = surroundings


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    """By value where another process could not import it, as cloudpickle does."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            buffer = io.BytesIO()
            torch.jit.save(value, buffer)
            return _load_scripted, (buffer.getvalue(),)
        if isinstance(value, ModuleType) and sys.modules.get(value.__name__) is value and type(value) is not ModuleType:
            return importlib.import_module, (value.__name__,)  # torch.backends.cudnn, which cloudpickle would refuse
        reduced = reduce_parametrized(value) or reduce_recorder(value)
        return super().reducer_override(value) if reduced is None else reduced


def _load_scripted(data: bytes) -> Any:
    return torch.jit.load(io.BytesIO(data))


def dumps(value: Any) -> bytes:
    """A pickle of anything that may hold modules."""
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()
