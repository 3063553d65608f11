"""What a module has beside its state dict, as training has left it: for workers that go on where others were lost.

Counters, histories, tables and generators in plain attributes, and buffers with `persistent=False`, are in no file: a
run that is resumed begins with the module as it is made then. But results must not show that a worker was lost, so
snapshots, which never leave memory, have them.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from xxhash import xxh3_128_digest

from raytrainer.metrics.metric_objects import is_metric
from raytrainer.strategies.same_numbers import version_of
from raytrainer.worker.data_pickling import Held, pickled, unpickled
from raytrainer.worker.plain_attributes import INTERNAL
from raytrainer.worker.sparse_parts import is_sparse, of_known_kind, put_together, taken_apart
from raytrainer.worker.written_tables import Tables

__all__ = ["AttributeSnapshots"]

log = logging.getLogger("raytrainer")

#: Where something is: a submodule's path, "__dict__" or "_buffers" there, and the name in that.
Place = tuple[str, str, str]

#: Bytes of an attribute from which on it is looked whether it has changed at all.
_LARGE = 2**16


class AttributeSnapshots:
    """Takes what may have changed since this was made, and puts it back.

    Args:
        module: As its task and its `setup` have made it: alike in each worker that comes in place of another.

    Attributes:
        tables: The large tensors, which are taken if they have been written to.
    """

    def __init__(self, module: nn.Module) -> None:
        held, tensors = Held(module), list[Tensor]()
        self._before = {place: _look(value, held, tensors) for place, value in _attributes(module)}
        self.tables = Tables(tensors)

    def take(self, module: nn.Module) -> dict[str, Any]:
        """What a worker in place of another needs: small data always, large data if it has changed.

        Returns:
            "values" and "tensors": the data; "gone": attributes that there are no more; "lost": names of what has
            changed and is no data, so that it cannot be taken.
        """
        held, tensors, values = Held(module), list[Tensor](), dict[Place, bytes]()
        held.unchanged = self.tables.unchanged()
        lost, there = list[str](), set[Place]()
        for place, value in _attributes(module):
            there.add(place)
            before, look = self._before.get(place), _look(value, held, tensors)
            if look.data is not None:
                if before is None or len(look.data) < _LARGE or look.digest != before.digest:
                    values[place] = look.data
            elif before is not None and (before.is_data or look.digest != before.digest):
                lost.append(f"{place[0]}.{place[2]}".lstrip("."))
        gone = [place for place in self._before if place not in there]
        travelling = [taken_apart(tensor) if is_sparse(tensor) else tensor.detach() for tensor in tensors]
        return {"values": values, "tensors": travelling, "gone": gone, "lost": lost}

    def put_back(self, module: nn.Module, state: dict[str, Any]) -> None:
        """Put back what `take` has taken; into the very objects that there are, where that is possible."""
        parts, held = dict(module.named_modules()), Held(module)
        unchanged, tensors = self.tables.live(), [put_together(parts) for parts in state["tensors"]]
        for (path, kind, name), data in state["values"].items():
            if path not in parts:
                continue
            try:
                value = unpickled(data, held, tensors, unchanged)
            except Exception as error:  # it refers to what is not there in this worker
                log.warning("%s.%s begins anew: %s: %s", type(parts[path]).__name__, name, type(error).__name__, error)
                continue
            where: dict[str, Any] = getattr(parts[path], kind)
            where[name] = _put(where.get(name), value)
            if kind == "_buffers":
                parts[path]._non_persistent_buffers_set.add(name)
        for path, kind, name in state["gone"]:
            if path in parts:
                getattr(parts[path], kind).pop(name, None)


def _attributes(module: nn.Module) -> Iterator[tuple[Place, Any]]:
    """Plain attributes, and buffers that are in no state dict, of the module and those inside it.

    Torch's own modules have no attributes that training changes, and metrics' states are taken elsewhere.
    """
    for path, part in module.named_modules():
        if is_metric(part):
            continue
        if not path or not type(part).__module__.startswith("torch."):
            yield from (((path, "__dict__", name), value) for name, value in vars(part).items() if name not in INTERNAL)
        for name, value in part._buffers.items():
            if name in part._non_persistent_buffers_set:
                yield (path, "_buffers", name), value


@dataclass(frozen=True)
class _Look:
    """What was seen of an attribute.

    Attributes:
        data: A pickle of it; None: it is more than data.
        digest: Of that; or of what data there is in an object.
        is_data: Whether it was data.
    """

    data: bytes | None
    digest: bytes | None
    is_data: bool


def _look(value: Any, held: Held, tensors: list[Tensor]) -> _Look:
    data = pickled(value, held, tensors)
    if data is not None:
        return _Look(data, xxh3_128_digest(data), True)
    if isinstance(value, Tensor) and not of_known_kind(value):
        return _Look(None, repr((id(value), version_of(value))).encode(), False)
    inside = getattr(value, "__dict__", None)
    if isinstance(inside, dict) and not type(value).__module__.startswith(("torch.", "raytrainer.")):
        found = {name: pickled(item, held, []) for name, item in inside.items()}
        return _Look(None, xxh3_128_digest(repr(found).encode()), False)
    return _Look(None, None, False)


def _put(own: Any, new: Any) -> Any:
    """`new`; or `own` with its content, as others may hold that too."""
    if type(own) is not type(new):
        return new
    with contextlib.suppress(RuntimeError, ValueError), torch.no_grad():  # of tensors that cannot be written to
        if isinstance(own, Tensor):
            if (
                own is not new
                and own.layout == torch.strided
                and (own.shape, own.dtype, own.device) == (new.shape, new.dtype, new.device)
            ):
                return own.copy_(new)
        elif isinstance(own, numpy.ndarray):
            if (own.shape, own.dtype) == (new.shape, new.dtype):
                own[...] = new
                return own
        elif isinstance(own, list):
            own[:] = new
            return own
        elif isinstance(own, (dict, set)):
            own.clear()
            own.update(new)
            return own
        elif isinstance(own, deque) and own.maxlen == new.maxlen:
            own.clear()
            own.extend(new)
            return own
        elif isinstance(own, torch.Generator):
            return own.set_state(new.get_state())
        elif isinstance(own, numpy.random.Generator):
            own.bit_generator.state = new.bit_generator.state
            return own
        elif isinstance(own, numpy.random.RandomState):
            own.set_state(new.get_state())
            return own
        elif isinstance(own, random.Random):
            own.setstate(new.getstate())
            return own
    return new
