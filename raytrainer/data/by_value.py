"""Loader processes that are not forked, for classes that live nowhere but in this process.

What is started by "spawn" or "forkserver" imports classes by name. Those of a script or notebook have come to a Ray
worker by value, and in a notebook they have no file: there, what such a process is given is pickled by value too.
"""

from __future__ import annotations

import copyreg
import io
import multiprocessing
import pickle
import sys
from collections import ChainMap
from multiprocessing import context, reduction
from multiprocessing.process import BaseProcess
from types import FunctionType
from typing import Any

from torch.utils.data import DataLoader

from raytrainer.private import ray_private

__all__ = ["start_all_by_value", "start_by_value"]


def start_by_value(loader: DataLoader[Any]) -> None:
    """Have a loader (a copy of the user's) start its processes so, where they would not find the classes of `__main__`.

    Nothing changes for processes that are forked, or of a script, which they read again.
    """
    if loader.num_workers == 0 or not _main_is_elsewhere():
        return
    given: Any = loader.multiprocessing_context
    method = (given or multiprocessing).get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if method in _CONTEXTS:
        loader.multiprocessing_context = _CONTEXTS[method]()


def start_all_by_value() -> None:
    """Have any process that is started here so, by whomever (a loader that is made in a user's `__iter__`, say)."""
    if _main_is_elsewhere():
        process: Any = BaseProcess
        process.__reduce__ = _ByValue.__reduce__


def _main_is_elsewhere() -> bool:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return file is None or ray_private.is_workers_script(file)


class _ByValue:
    """A process whose function and arguments are pickled by value."""

    def __reduce__(self) -> Any:
        by_value, handed = ray_private.pickler_by_value(), _handed_over()
        # of a class: the pickler looks there when it is made
        table = {"dispatch_table": ChainMap(handed, by_value.dispatch_table, copyreg.dispatch_table)}
        stream = io.BytesIO()
        type("Pickler", (by_value,), table)(stream).dump(self.__dict__)
        return _rebuilt, (type(self), stream.getvalue())


def _handed_over() -> dict[Any, Any]:
    """How queues, pipes and shared tensors are pickled for the process that is being started."""
    found: dict[Any, Any] = vars(reduction.ForkingPickler)["_extra_reducers"]
    return found


def _rebuilt(kind: Any, attributes: bytes) -> Any:
    process = kind.__new__(kind)
    process.__dict__.update(pickle.loads(attributes))
    pickler: Any = reduction.ForkingPickler
    pickler.reducer_override = _by_value_back
    return process


def _by_value_back(pickler: Any, thing: Any) -> Any:
    """How a process that was started by value pickles what it sends: batches may be of such classes too.

    Where it comes from, its class is known by what cloudpickle has numbered it with, so that it is the same one there.
    """
    if isinstance(thing, (type, FunctionType)) and thing.__module__ == "__main__":
        if thing not in _pickled:
            stream = io.BytesIO()
            ray_private.pickler_by_value()(stream).dump(thing)
            _pickled[thing] = stream.getvalue()
        return pickle.loads, (_pickled[thing],)
    return NotImplemented


_pickled: dict[Any, bytes] = {}


class _SpawnProcess(_ByValue, context.SpawnProcess):
    pass


class _SpawnContext(context.SpawnContext):
    Process = _SpawnProcess


class _ForkServerProcess(_ByValue, context.ForkServerProcess):
    pass


class _ForkServerContext(context.ForkServerContext):
    Process = _ForkServerProcess


_CONTEXTS = {"spawn": _SpawnContext, "forkserver": _ForkServerContext}
