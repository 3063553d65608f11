"""Whether workers read the same: a cheap fingerprint of each one's first batches.

Each tensor (array, list of strings ...) of a batch is a leaf, known by its way from the root. Workers read the same if
a leaf is the same on both in all of these batches, and says enough for that to be no accident: one that is the same in
every batch (positions, masks) says nothing, nor do a few numbers. Leaves are looked at one by one, since random
augmentation makes images differ while their labels tell.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from raytrainer.data.sharding import Share
from raytrainer.metric_messages import ReadSample

__all__ = ["DealtOut", "Fingerprint", "leaves", "of_other_datasets", "read_alike", "read_apart", "watch"]

log = logging.getLogger("raytrainer")

#: Batches that are looked at.
BATCHES = 8

#: Elements of a leaf that are looked at.
ELEMENTS = 512

#: Leaves of a batch that are looked at.
LEAVES = 32

#: What a leaf must tell, in bits, to be no accident.
ENOUGH = 15.0


class Fingerprint:
    """Of what one worker reads from one loader.

    Args:
        loader: As in "the train loader".
        part: Which part of the data it is to read.
        advice: What to write where it is not this part that it reads.
    """

    def __init__(self, loader: str, part: int, advice: str) -> None:
        self.loader, self.part, self.advice = loader, part, advice
        self.batches = 0
        self._hashes: dict[str, list[int]] = {}
        self._values: dict[str, set[Any]] = {}
        self._elements: dict[str, int] = {}

    @property
    def complete(self) -> bool:
        return self.batches >= BATCHES

    def add(self, batch: Any) -> None:
        """The next batch, as the loader gives it."""
        self.batches += 1
        for number, (path, values) in enumerate(leaves(batch)):
            if number == LEAVES:
                return
            self._hashes.setdefault(path, []).append(zlib.crc32(repr(values).encode()))
            self._values.setdefault(path, set()).update(values)
            self._elements[path] = self._elements.get(path, 0) + len(values)

    def sample(self) -> ReadSample:
        """What to compare."""
        leaves = {}
        for path, hashes in self._hashes.items():
            bits = self._elements[path] * math.log2(max(1, len(self._values[path])))
            if bits >= ENOUGH and len(set(hashes)) > 1 and len(hashes) == self.batches:
                leaves[path] = tuple(hashes)
        return ReadSample(self.loader, self.part, self.batches, leaves, self.advice)


class DealtOut:
    """In the place of a `Fingerprint` where samples are dealt out by number: of what dataset they are.

    Args:
        loader: As in "the train loader".
        part: Which part of the data is this worker's.
        dataset: What has the samples.
    """

    complete = True

    def __init__(self, loader: str, part: int, dataset: Any) -> None:
        self.loader, self.part = loader, part
        self._mark = zlib.crc32(repr(_mark(dataset)).encode())

    def add(self, batch: Any) -> None:
        """Batches say nothing more."""

    def sample(self) -> ReadSample:
        """What to compare."""
        return ReadSample(self.loader, self.part, 0, {}, "", self._mark)


def watch(loader: str, share: Share, splits: bool, dataset: Any, advice: str) -> Fingerprint | DealtOut | None:
    """What finds out whether workers read different parts of the same; None where one worker reads all.

    Args:
        loader: As in "the train loader".
        share: This worker's part.
        splits: Whether parts are dealt out here, by number.
        dataset: Of which.
        advice: See `Fingerprint`.
    """
    if share.count == share.readers == 1:
        return None
    if not splits:
        return Fingerprint(loader, share.index, advice)
    return DealtOut(loader, share.index, dataset) if share.readers == 1 else None


def _mark(dataset: Any) -> Any:
    """What can be told of a dataset without having it make a sample."""
    try:
        length = len(dataset)
        if isinstance(dataset, Subset):
            return length, [int(index) for index in dataset.indices[:ELEMENTS]], _mark(dataset.dataset)
        if isinstance(dataset, ConcatDataset):
            return [_mark(part) for part in dataset.datasets]
        if type(dataset).__module__.startswith("datasets."):  # Hugging Face's
            rows = dataset.with_format("arrow")
            return length, rows[0].to_pylist(), rows[length - 1].to_pylist()
    except Exception as error:  # whatever a user's own makes of it
        log.debug("a dataset could not be told from others", exc_info=error)
        return None
    return length


def of_other_datasets(samples: Sequence[ReadSample | None]) -> tuple[int, int] | None:
    """Two workers whose parts are of different datasets; None if there are none."""
    marks = {rank: one.dataset for rank, one in enumerate(samples) if one is not None and one.dataset is not None}
    first = next(iter(marks), None)
    return next(((first, rank) for rank, mark in marks.items() if first is not None and mark != marks[first]), None)


def read_alike(samples: Sequence[ReadSample | None]) -> tuple[int, int, str] | None:
    """Two workers that are to read different parts and read the same, and in which leaf; None if there are none."""
    for second, other in enumerate(samples):
        for first, one in enumerate(samples[:second]):
            if one is None or other is None or one.part == other.part or one.batches != other.batches:
                continue
            for path, found in one.leaves.items():
                if other.leaves.get(path) == found:
                    return first, second, path
    return None


def read_apart(samples: Sequence[ReadSample | None]) -> tuple[int, int, str] | None:
    """Two workers that are to read the same part and read different ones, and in which leaf; None if there are none."""
    for second, other in enumerate(samples):
        for first, one in enumerate(samples[:second]):
            if one is None or other is None or one.part != other.part or one.batches != other.batches:
                continue
            for path in one.leaves.keys() & other.leaves.keys():
                if other.leaves[path] != one.leaves[path]:
                    return first, second, path
    return None


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The first values of each leaf, after its way from the root."""
    if isinstance(value, Tensor):
        if value.numel() and value.layout is torch.strided and not value.is_quantized:
            flat = value.detach().reshape(-1)[:ELEMENTS].cpu()
            yield path, flat.tolist()
    elif isinstance(value, (str, bytes)):
        yield path, [value[:ELEMENTS]]
    elif isinstance(value, (bool, int, float, complex)):
        yield path, [value]
    elif isinstance(value, Mapping):
        for key, item in value.items():  # not by iteration, which gives a TensorDict's rows
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        if value and all(isinstance(item, (str, bytes, bool, int, float)) for item in value):
            yield path, list(value[:ELEMENTS])
            return
        for index, item in enumerate(value[:ELEMENTS]):
            yield from leaves(item, f"{path}[{index}]")
    elif isinstance(getattr(value, "shape", None), tuple) and callable(getattr(value, "tolist", None)):
        if value.size:  # NumPy's arrays
            yield path, value.reshape(-1)[:ELEMENTS].tolist()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name, None), f"{path}.{field.name}")
    elif callable(getattr(value, "to_dict", None)):  # PyTorch Geometric's
        yield from leaves(value.to_dict(), path)
    elif callable(getattr(value, "to", None)):
        for name, item in getattr(value, "__dict__", {}).items():
            yield from leaves(item, f"{path}.{name}")
