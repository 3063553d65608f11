"""Copies of a state in buffers that are used again: training waits for one copy, and for no allocation."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from raytrainer.checkpointing.pieces import KEY, Mark, places_of
from raytrainer.gpu.pinned import pinned_tensors
from raytrainer.memory_segments import Handed
from raytrainer.strategies.same_numbers import version_of
from raytrainer.worker.shared_staging import SharedStaging
from raytrainer.worker.step_copies import is_plain
from raytrainer.worker.way_home import WayHome

__all__ = ["Slot", "Staged", "Staging", "arrived"]


class Staged(dict[str, Any]):
    """A copied state. Its buffers are used for a later copy when nobody holds it any more.

    Attributes:
        copies: For each tensor of the state, in order: what it was, and its copy.
        before: An earlier copy, some of whose buffers this one has too.
        handed: Where the shards are, if they are in memory that outlives this process; of each the state then says
            "at", "shape" and "dtype".
        arrive: Waits for what is on its way.
    """

    copies: list[tuple[_Mark, Tensor]]
    before: Staged | None = None
    handed: Handed | None = None
    arrive: Callable[[], None] | None = None


def arrived(state: dict[str, Any]) -> dict[str, Any]:
    """A state, once all of it is there. Of one that is staged, tensors may be on their way, other than in "own"."""
    if isinstance(state, Staged) and state.arrive is not None:
        state.arrive()
    return state


#: Where shards go, of `SharedStaging`'s; None: where all else goes.
Slot = int | None

#: What makes buffers exchangeable: type, shape, and whether a GPU copies to them.
_Kind = tuple[torch.dtype, torch.Size, bool]

#: Bytes from which on it is worth while to share a copy.
_LARGE = 2**16

#: Where a tensor is, and how often it has been written to.
_Mark = tuple[int, int, torch.Size, tuple[int, ...]]


class Staging:
    """Hands out copies, in buffers of earlier ones that nobody holds any more.

    Args:
        device: Where most of what is copied is.

    Attributes:
        shared: Where shards go, if they are to be where they outlive this process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.shared: SharedStaging | None = None
        self._way_home = WayHome(device)
        self._free: dict[_Kind, list[Tensor]] = {}
        self._needed: Counter[_Kind] = Counter()  # how many of each kind one copy of this run takes
        self._returned: deque[tuple[Sequence[_Kind], Sequence[Tensor]]] = (
            deque()
        )  # from copies that nobody holds any more
        self._reserving: threading.Thread | None = None
        self._latest: weakref.ref[Staged] | None = None

    def begin(self) -> None:
        """Another run begins: with its first copy, buffers of kinds that it does not need are dropped."""
        self._needed.clear()

    def reserve(self, state: Mapping[str, Any]) -> None:
        """Have a thread take the memory that a copy of `state` needs for the GPU's tensors, if it is not there yet."""
        if self.shared is not None and KEY in state:
            self.shared.reserve(state[KEY])
            state = {name: value for name, value in state.items() if name != KEY}
        if self._reserving is not None and self._reserving.is_alive():
            return
        kinds = [_kind(tensor) for tensor in _tensors(state)]
        self._expect(kinds)
        free = Counter({kind: len(buffers) for kind, buffers in self._free.items()})
        lacking = list((Counter(kind for kind in kinds if kind[2]) - free).elements())
        if not lacking:
            return

        def take() -> None:
            with contextlib.suppress(Exception):  # the copy that needs the memory will say so
                self._returned.append((lacking, self._pinned(lacking)))

        self._reserving = threading.Thread(target=take, name="raytrainer-reserve", daemon=True)
        self._reserving.start()

    def copy(self, state: Mapping[str, Any], slot: Slot = None) -> Staged:
        """`state` with every tensor in it copied to main memory (pinned, if it comes from a GPU), and all else too.

        Of a GPU with room for it, most is still on its way: see `arrived`.

        If nothing large has changed since the latest copy, which is still held (by who writes it), they share memory.

        Args:
            state: It.
            slot: Of `shared`, where shards go. None: they are copied as all else is.
        """
        if slot is not None and self.shared is not None and KEY in state:
            pieces = state[KEY]
            handed = self.shared.copy(slot, pieces)
            staged = self.copy({name: value for name, value in state.items() if name != KEY})
            staged[KEY] = places_of(pieces)
            staged.handed = handed
            return staged
        tensors = _tensors(state)
        before = None if self._latest is None else self._latest()
        found = _unchanged(tensors, [] if before is None else before.copies)
        kinds = [_kind(tensor) for tensor, shared in zip(tensors, found, strict=True) if shared is None]
        buffers = self._take(kinds)
        left, copies = iter(zip(kinds, buffers, strict=True)), list[tuple[_Mark, Tensor]]()
        own = set(map(id, _tensors(state.get("own"))))
        sent: tuple[list[Tensor], list[Tensor]] = ([], [])
        waits = False  # for copies from a GPU

        def copied(value: Tensor) -> Tensor:
            nonlocal waits
            copy = found[len(copies)]
            if copy is None:
                kind, copy = next(left)
                if kind[2] and id(value) not in own and self._may_be_sent(value):
                    sent[0].append(value)
                    sent[1].append(copy)
                else:
                    # leaf tensors may require gradients; the copy never does
                    copy.copy_(value.detach(), non_blocking=True)
                    waits |= kind[2]
            copies.append((_mark(value), copy))
            return copy

        arrive: Callable[[], None] | None = None
        try:
            with torch.no_grad():
                staged = Staged(_walk(state, copied, _copied))
                arrive = self._way_home.send(*sent) if sent[0] else None
                if arrive is None:
                    for value, copy in zip(*sent, strict=True):
                        copy.copy_(value.detach(), non_blocking=True)
        finally:
            if waits or (sent[0] and arrive is None):  # also before the buffers of a failed copy may go
                torch.cuda.current_stream().synchronize()
        weakref.finalize(staged, self._come_back, kinds, buffers, arrive)
        staged.arrive = arrive
        staged.copies = copies
        staged.before = before if any(shared is not None for shared in found) else None
        self._latest = weakref.ref(staged)
        return staged

    def _may_be_sent(self, tensor: Tensor) -> bool:
        return tensor.device == self._device and is_plain(tensor)

    def _come_back(self, kinds: Sequence[_Kind], buffers: Sequence[Tensor], arrive: Callable[[], None] | None) -> None:
        """Nobody holds a copy any more: its buffers, once nothing comes there any more, are for another."""
        with contextlib.suppress(RuntimeError):  # CUDA is at its end, and so are they
            if arrive is not None:
                arrive()
            self._returned.append((kinds, buffers))

    def _take(self, kinds: Sequence[_Kind]) -> list[Tensor]:
        """A buffer for each: what is free, and new ones."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        self._expect(kinds)
        # in order, so that those which lie in one piece of memory stay together
        found = [self._free[kind].pop(0) if self._free.get(kind) else None for kind in kinds]
        lacking = [kind for kind, buffer in zip(kinds, found, strict=True) if buffer is None]
        pinned = [kind for kind in lacking if kind[2]]
        new = {False: iter([torch.empty(shape, dtype=dtype) for dtype, shape, from_gpu in lacking if not from_gpu])}
        if pinned:
            with ThreadPoolExecutor(1) as pool:
                new[True] = iter(pool.submit(self._pinned, pinned).result())
        return [next(new[kind[2]]) if buffer is None else buffer for kind, buffer in zip(kinds, found, strict=True)]

    def _expect(self, kinds: Sequence[_Kind]) -> None:
        """Make what has come back available, up to what two copies take."""
        counts = Counter(kinds)
        if not self._needed:
            self._free = {kind: buffers for kind, buffers in self._free.items() if kind in counts}
        self._needed |= counts
        while self._returned:
            for kind, buffer in zip(*self._returned.popleft(), strict=True):
                if len(self._free.get(kind, ())) < 2 * self._needed[kind]:
                    self._free.setdefault(kind, []).append(buffer)

    def _pinned(self, kinds: Sequence[_Kind]) -> list[Tensor]:
        return pinned_tensors([(dtype, shape) for dtype, shape, _ in kinds], self._device)


def _kind(tensor: Tensor) -> _Kind:
    return tensor.dtype, tensor.shape, tensor.device.type == "cuda"


def _mark(tensor: Tensor) -> _Mark:
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, torch.nn.Parameter):
        return 0, 0, tensor.shape, ()
    return tensor.data_ptr(), version_of(tensor), tensor.shape, tensor.stride()


def _unchanged(tensors: Sequence[Tensor], copies: Sequence[tuple[_Mark, Tensor]]) -> list[Tensor | None]:
    """For each tensor the copy that it can share; none for any, unless for all large ones.

    Two files of one moment have such: that of the best checkpoint and the last.
    """
    found: list[Tensor | None] = [None] * len(tensors)
    large = [index for index, tensor in enumerate(tensors) if tensor.numel() * tensor.element_size() >= _LARGE]
    if not large or len(copies) != len(tensors):
        return found
    for index in large:
        tensor, (mark, copy) = tensors[index], copies[index]
        same = tensor.device.type == "cpu" and mark[0] != 0 and _mark(tensor) == mark and tensor.dtype == copy.dtype
        # the content too, as `.data` is written to without a version
        if not same or not torch.equal(copy, tensor.detach()):
            return [None] * len(tensors)
        found[index] = copy
    return found


#: What cannot change. There are thousands of these, and to ask `deepcopy` costs more than all else of a sharded state.
_FIXED = frozenset({int, float, bool, str, bytes, type(None), torch.dtype, torch.device, Mark})


def _copied(value: Any) -> Any:
    """What training may change while it is written: arrays, queues, objects of users."""
    if type(value) in _FIXED:
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # whether it can be pickled is for others to find out
        return value


def _walk(value: Any, tensor: Callable[[Tensor], Any], other: Callable[[Any], Any]) -> Any:
    """`value` in containers of its own, with what `tensor` and `other` make of all else, called in a fixed order."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, Mapping):
        return {key: _walk(item, tensor, other) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if _FIXED.issuperset(map(type, value)):  # the hundreds of numbers that are a generator's state
            return list(value) if isinstance(value, list) else tuple(value)
        items = [_walk(item, tensor, other) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return other(value)


def _tensors(state: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _walk(state, found.append, lambda value: None)
    return found
