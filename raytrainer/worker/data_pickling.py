"""Pickles of data alone: values, tensors, arrays and generators, in containers and dataclasses.

What a module holds (parameters, buffers, submodules) is referred to by its name; large tensors go beside the pickle.
"""

from __future__ import annotations

import contextlib
import datetime
import enum
import io
import pathlib
import pickle
import random
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from raytrainer.worker.sparse_parts import of_known_kind

__all__ = ["Held", "pickled", "unpickled"]

_SCALARS = frozenset({type(None), bool, int, float, complex})
_DATA = _SCALARS | {
    str, bytes, bytearray, range, slice, dict, OrderedDict, Counter, defaultdict, list, tuple, set, frozenset, deque,
    types.SimpleNamespace, torch.dtype, torch.device, torch.Size, numpy.ndarray, datetime.date, datetime.time,
    datetime.datetime, datetime.timedelta, torch.Generator, numpy.random.Generator, numpy.random.RandomState,
    random.Random, pickle.PickleBuffer,
}  # fmt: skip
_DATA_BASES = (
    enum.Enum, numpy.generic, numpy.dtype, numpy.random.BitGenerator, numpy.random.SeedSequence, pathlib.PurePath
)  # fmt: skip

#: Packages whose functions make data of what is in a pickle.
_MAKERS = frozenset({"copyreg", "_codecs", "builtins", "collections", "numpy", "torch"})

#: Bytes from which on a tensor goes beside the pickle.
_LARGE = 2**12


class Held:
    """What a module's attributes may refer to, and another worker has as well.

    Attributes:
        unchanged: Places, by id, of large tensors that another worker finds as they are here.
    """

    def __init__(self, module: nn.Module) -> None:
        persistent = {
            f"{path}.{name}".lstrip("."): tensor
            for path, part in module.named_modules()
            for name, tensor in part._buffers.items()
            if tensor is not None and name not in part._non_persistent_buffers_set
        }
        tensors = {**dict(module.named_parameters()), **persistent}
        self.things: dict[str, Any] = {**tensors, **{f"/{path}": part for path, part in module.named_modules()}}
        self.names = {id(thing): name for name, thing in self.things.items()}
        self._tensors = list(tensors.values())
        self.unchanged: dict[int, int] = {}

    @cached_property
    def storages(self) -> set[int]:
        """Where its tensors' memory begins; asked for only where there are attributes to be compared with it."""
        return {_storage(tensor) for tensor in self._tensors} - {0}


def pickled(value: Any, held: Held, tensors: list[Tensor]) -> bytes | None:
    """A pickle of data, less its large tensors, which are appended to `tensors`; None if it is more than data."""
    if type(value) in _SCALARS:
        return pickle.dumps(value, 5)
    file, count = io.BytesIO(), len(tensors)
    try:
        _Pickler(file, held, tensors).dump(value)
    except Exception:  # the pickler's own, or of a thing that cannot be pickled
        del tensors[count:]
        return None
    return file.getvalue()


def unpickled(data: bytes, held: Held, tensors: Sequence[Tensor], unchanged: Sequence[Tensor | None]) -> Any:
    """The reverse.

    Args:
        data: A pickle.
        held: By what names are meant.
        tensors: The large ones.
        unchanged: Those of `Held.unchanged`.
    """
    return _Unpickler(io.BytesIO(data), held, tensors, unchanged).load()


def _storage(tensor: Tensor) -> int:
    with contextlib.suppress(Exception):  # sparse ones have none
        return tensor.untyped_storage().data_ptr()
    return 0


class _NoDataError(Exception):
    """A copy of this would not be what it is."""


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, held: Held, tensors: list[Tensor]) -> None:
        super().__init__(file, 5)
        self._held, self._tensors = held, tensors
        self._classes: dict[type, bytes] = {}
        self._numbers: dict[int, int] = {}  # by id, of tensors that go beside

    def persistent_id(self, value: Any) -> Any:
        kind = type(value)
        if kind in _DATA:
            return None
        if (name := self._held.names.get(id(value))) is not None:
            return "held", name
        if kind is Tensor:
            return self._tensor_id(value)
        if isinstance(value, type):
            return self._class_id(value)
        if isinstance(value, _DATA_BASES) or (isinstance(value, tuple) and hasattr(kind, "_fields")):
            return None
        if is_dataclass(value) and not hasattr(kind, "__slots__") and not _has_own_pickling(kind):
            return None
        if value is _small or (
            hasattr(value, "__qualname__") and str(getattr(value, "__module__", None)).partition(".")[0] in _MAKERS
        ):
            return None
        raise _NoDataError(kind)

    def _tensor_id(self, value: Tensor) -> Any:
        held = self._held
        if id(value) in held.unchanged:  # and so none of the module's own
            return "unchanged", held.unchanged[id(value)]
        if _storage(value) in held.storages:
            raise _NoDataError("a view of what the module holds")
        if value.is_meta:
            return None
        if not of_known_kind(value):
            raise _NoDataError(value.layout)
        if value.is_cpu and value.layout == torch.strided and value.numel() * value.element_size() < _LARGE:
            return None  # a GPU's is not read here, which would wait for the GPU
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._tensors)
            self._tensors.append(value)
        return "tensor", self._numbers[id(value)], str(value.device)

    def _class_id(self, value: type) -> Any:
        by_name = getattr(sys.modules.get(value.__module__), value.__qualname__, None) is value
        if by_name and value.__module__ != "__main__":
            return None
        if value not in self._classes:
            by_value = sys.modules.get("ray.cloudpickle", pickle)  # in a process of its own, a worker has imported it
            self._classes[value] = by_value.dumps(value)
        return "class", self._classes[value]

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor:
            return NotImplemented
        if value.is_meta:
            return _small, (b"", value.dtype, tuple(value.shape), "meta")
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return _small, (data, value.dtype, tuple(value.shape), str(value.device))


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, file: io.BytesIO, held: Held, tensors: Sequence[Tensor], unchanged: Sequence[Tensor | None]
    ) -> None:
        super().__init__(file)
        self._held, self._tensors, self._unchanged = held, tensors, unchanged
        self._made: dict[int, Tensor] = {}

    def persistent_load(self, name: Any) -> Any:
        match name:
            case "held", path:
                return self._held.things[path]
            case "unchanged", index if self._unchanged[index] is not None:
                return self._unchanged[index]
            case "tensor", index, device:
                if index not in self._made:
                    self._made[index] = self._tensors[index].to(device, copy=True)
                return self._made[index]
            case "class", data:
                return pickle.loads(data)
        raise pickle.UnpicklingError(f"there is no {name!r} any more")


def _has_own_pickling(kind: type) -> bool:
    names = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")
    return any(name in vars(base) for base in kind.__mro__[:-1] for name in names)


def _small(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape).to(device)
