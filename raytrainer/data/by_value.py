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
from typing import Any

from torch.utils.data import DataLoader

from raytrainer.private import ray_private

__all__ = ["start_by_value"]


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
    return process


class _SpawnProcess(_ByValue, context.SpawnProcess):
    pass


class _SpawnContext(context.SpawnContext):
    Process = _SpawnProcess


class _ForkServerProcess(_ByValue, context.ForkServerProcess):
    pass


class _ForkServerContext(context.ForkServerContext):
    Process = _ForkServerProcess


_CONTEXTS = {"spawn": _SpawnContext, "forkserver": _ForkServerContext}
