"""What is given in place of a loader, and cannot be one; loaders that have nothing to give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from raytrainer.errors import DataError

__all__ = ["ended_at_once", "require_loader", "without_batches"]


def require_loader(loader: Any, stage: str) -> None:
    """Refuse what gives no batches, or others than were meant: a string's letters, a dict's keys, a list of loaders.

    Raises:
        DataError: Says what it is, and what to give.
    """
    if isinstance(loader, type):
        what = f"{loader.__name__}, a class: give an object, {loader.__name__}(...)"
    elif isinstance(loader, (str, bytes)):
        what = f"{loader!r}, a text: give what reads it"
    elif isinstance(loader, Mapping):
        values = ", ".join(f"{key!r}: {_kind(value)}" for key, value in list(loader.items())[:5])
        what = f"a {type(loader).__name__} whose values are not all loaders ({{{values}}}): give loaders only"
    elif isinstance(loader, (list, tuple)) and any(isinstance(item, DataLoader) for item in loader):
        at, item = next((at, item) for at, item in enumerate(loader) if not isinstance(item, DataLoader))
        what = f"a {type(loader).__name__} of loaders, in which number {at} is {_kind(item)}: give loaders only"
    elif getattr(loader, "ndim", 3) < 3 and hasattr(loader, "shape"):
        rows = "columns' names" if hasattr(loader, "columns") else "rows"
        what = (
            f"a {type(loader).__name__} of shape {tuple(loader.shape)}, whose {rows} would be taken for batches: give "
            f"DataLoader(TensorDataset(...), batch_size=...)"
        )
    elif hasattr(loader, "__iter__"):
        return
    elif hasattr(loader, "__getitem__"):
        what = f"a {type(loader).__name__}, which is no loader: give DataLoader(dataset, batch_size=...)"
    elif callable(loader):
        what = f"{loader!r}, which is not called here: give what it returns"
    else:
        what = f"{loader!r}: give a DataLoader"
    raise DataError(f"the {stage} loader is {what}. A loader is a DataLoader, or any iterable of batches.")


def without_batches(loader: Any, size: int | None, stage: str, rank: int, count: int) -> str:
    """What is said of a loader of so many samples (None: of an unknown number) that gives worker `rank` no batch."""
    return (
        f"the {stage} loader has no batch for rank {rank} of {count}: its dataset has "
        f"{'an unknown number of' if size is None else size} sample(s), "
        f"batch_size={getattr(loader, 'batch_size', None)}, drop_last={getattr(loader, 'drop_last', False)}. Give it "
        f"more data, a smaller batch_size, drop_last=False or fewer workers, or switch the stage off with "
        f"limit_{stage}_batches=0."
    )


def ended_at_once(stage: str, rank: int, count: int, epoch: int) -> str:
    """What is said of a loader that ends before an epoch's first batch."""
    return (
        f"the {stage} loader gave no batch to rank {rank} of {count} in epoch {epoch}. If it reads an IterableDataset, "
        f"make sure that each worker yields something; if it is an iterator, which can be read once only, return a "
        f"DataLoader or an object whose __iter__ starts anew."
    )


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
