"""`RayDataset`: a Ray Dataset together with how batches are cut from it. Does not import Ray."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raytrainer.errors import ConfigurationError

__all__ = ["RayDataset", "as_ray_datasets"]


@dataclass(frozen=True)
class RayDataset:
    """What `train_dataset()` and its siblings return, and what `fit(model, RayDataset(ds, batch_size=64))` takes.

    Batches are dicts of tensors by column, on the module's device, or what `collate_fn` makes of the columns.

    Args:
        dataset: A `ray.data.Dataset`.
        batch_size: Rows per batch and worker.
        shuffle: Training only. False: the dataset's order. True: all rows, anew in each epoch, drawn from
            (seed, epoch). An int: a window of so many rows on each worker, over blocks in a new order, which costs
            less where the dataset does not fit into memory.
        drop_last: Training only: drop an epoch's rows that do not fill a batch on every worker. Without it every row
            is trained on exactly once, in last batches that are smaller. Evaluation always counts every row once.
        columns: The columns to read; None: all.
        dtypes: The type of all floating-point columns, or of each column named: `{"label": torch.int64}`. A
            floating-point type named for a column of integers has its nulls become NaN.
        collate_fn: Makes a batch of a dict of NumPy arrays by column. Needed for text, for arrays of varying shape, and
            for integers with nulls; columns of the latter two are object arrays (of arrays; of numbers and None).
        prefetch_batches: Batches that a thread prepares ahead; 0: none, all happens in the loop.
        keep_in_memory: True: read once and keep the blocks in Ray's object store; epochs then start at once, and a
            full shuffle costs next to nothing. False: read again in each epoch, for random augmentation in
            `map_batches`, or for more than fits. None: keep what is only read (not mapped by user code) and takes at
            most 30 % of a node's object store. What is kept stays for the next run on the same workers that is given
            the same dataset object, if it reads local files, and these have not changed.

    Raises:
        ConfigurationError: A value that cannot work.
    """

    dataset: Any
    batch_size: int = 256
    shuffle: bool | int = False
    drop_last: bool = False
    columns: Sequence[str] | None = None
    dtypes: torch.dtype | Mapping[str, torch.dtype] | None = None
    collate_fn: Callable[[dict[str, Any]], Any] | None = None
    prefetch_batches: int = 2
    keep_in_memory: bool | None = None

    def __post_init__(self) -> None:
        if not _is_ray_dataset(self.dataset):
            raise ConfigurationError(f"RayDataset({type(self.dataset).__name__}): give a ray.data.Dataset.")
        _whole_number("batch_size", self.batch_size, 1)
        _whole_number("prefetch_batches", self.prefetch_batches, 0)
        if not isinstance(self.shuffle, bool):
            _whole_number("shuffle", self.shuffle, 2, "True, False or a window of at least 2 rows")
        if isinstance(self.columns, str) or (self.columns is not None and not self.columns):
            raise ConfigurationError(f"columns={self.columns!r}: give a list of at least one name, or None for all.")
        dtypes = self.dtypes.values() if isinstance(self.dtypes, Mapping) else [self.dtypes]
        for dtype in dtypes:
            if dtype is not None and not isinstance(dtype, torch.dtype):
                raise ConfigurationError(f"dtypes: {dtype!r} is no torch.dtype, such as torch.float32.")
        if self.collate_fn is not None and not callable(self.collate_fn):
            raise ConfigurationError(f"collate_fn={self.collate_fn!r}: give a function of a dict of arrays.")


def _whole_number(name: str, value: Any, least: int, allowed: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name}={value!r}: give {allowed or f'a whole number, at least {least}'}.")


def _is_ray_dataset(value: Any) -> bool:
    module = sys.modules.get("ray.data")  # who has a Dataset has imported it
    kind = getattr(module, "Dataset", None)
    return kind is not None and isinstance(value, kind)


def as_ray_datasets(value: Any) -> list[RayDataset] | None:
    """One Ray Dataset or several (in a list or a mapping), each with its settings; None if `value` is something else.

    Raises:
        ConfigurationError: Ray Datasets are mixed with other loaders.
    """
    values = value
    if isinstance(value, Mapping):
        values = list(value.values())
    elif not isinstance(value, (list, tuple)):
        values = [value]
    ours = [isinstance(item, RayDataset) or _is_ray_dataset(item) for item in values]
    if not any(ours):
        return None
    if not all(ours):
        kinds = sorted({type(item).__name__ for item in values})
        raise ConfigurationError(f"{', '.join(kinds)} together: give Ray Datasets only, or other loaders only.")
    return [item if isinstance(item, RayDataset) else RayDataset(item) for item in values]
