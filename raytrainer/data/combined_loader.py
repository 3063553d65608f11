"""`CombinedLoader`: several loaders as one, in a dict, a list, or any nesting of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from raytrainer.errors import ConfigurationError

__all__ = ["MODES", "CombinedLoader", "as_combined", "as_list", "combined_length"]

MODES = ("min_size", "max_size_cycle", "max_size", "sequential")

_END: Any = object()


class CombinedLoader:
    """Several loaders, read at the same time or one after the other. Each is sharded, shuffled and resumed as if alone.

    A dict or list of loaders from `train_dataloader`, or handed to `fit`, is the same as one with "max_size_cycle".

    Args:
        iterables: Loaders in a dict, list or tuple, which may be nested. Batches have the same form, with a batch of
            each loader in its place; but for "sequential".
        mode: "min_size": until the first loader ends. "max_size_cycle": until the longest one ends; the others begin
            anew, in another order. "max_size": likewise, with None in place of loaders that have ended. "sequential":
            one loader after the other, each batch as its loader gives it.

    Raises:
        ConfigurationError: Another mode, or no loader.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in MODES:
            raise ConfigurationError(f"CombinedLoader(mode={mode!r}): give one of {', '.join(MODES)}.")
        self.iterables, self.mode = iterables, mode
        if isinstance(iterables, (list, tuple, Mapping)) and not iterables:
            raise ConfigurationError(f"CombinedLoader({iterables!r}): give at least one loader.")

    @property
    def flattened(self) -> list[Any]:
        """The loaders, depth first."""
        return list(_leaves(self.iterables))

    def form(self, batches: Sequence[Any]) -> Any:
        """One batch of each loader, in the form that the loaders have."""
        return _formed(self.iterables, iter(batches))

    def __len__(self) -> int:
        lengths = combined_length(self.mode, [len(loader) for loader in self.flattened])
        assert lengths is not None
        return lengths

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        """(batch, batch_idx, dataloader_idx) without a Trainer: of whole loaders, in this process."""
        loaders = self.flattened
        if self.mode == "sequential":
            for number, loader in enumerate(loaders):
                yield from ((batch, index, number) for index, batch in enumerate(loader))
            return
        iterators, ended, index = [iter(loader) for loader in loaders], [False] * len(loaders), 0
        while True:
            batches = []
            for number, iterator in enumerate(iterators):
                batch = next(iterator, _END)
                if batch is _END:
                    ended[number] = True
                    if self.mode == "min_size" or all(ended):
                        return
                    batch = None
                    if self.mode == "max_size_cycle":
                        iterators[number] = iter(loaders[number])
                        batch = next(iterators[number], _END)
                        if batch is _END:
                            return
                batches.append(batch)
            yield self.form(batches), index, 0
            index += 1


def as_combined(loaders: Any) -> CombinedLoader | None:
    """Several loaders as one: a `CombinedLoader`, Lightning's too, or a dict or list of loaders; None: a single one.

    Raises:
        ConfigurationError: Lists of lists, of which nobody could say whether they are loaders or batches.
    """
    if isinstance(loaders, CombinedLoader):
        return loaders
    if type(loaders).__name__ == "CombinedLoader" and hasattr(loaders, "iterables"):
        return CombinedLoader(loaders.iterables, getattr(loaders, "mode", None) or loaders._mode)
    if not _is_container(loaders):
        return None
    if isinstance(loaders, (list, tuple)) and all(isinstance(item, (list, tuple)) for item in loaders):
        raise ConfigurationError(
            "the training loader is a list of lists, which may be several loaders or one loader's batches: wrap it in "
            "CombinedLoader(..., mode=...), or give an object whose __iter__ yields the batches."
        )
    return CombinedLoader(loaders, "max_size_cycle")


def as_list(loaders: Any) -> list[Any]:
    """One loader, or a list or mapping of loaders, nested or not, as a list: evaluated one after the other."""
    if loaders is None:
        return []
    combined = loaders if isinstance(loaders, CombinedLoader) else None
    if combined is None and type(loaders).__name__ == "CombinedLoader" and hasattr(loaders, "iterables"):
        combined = as_combined(loaders)
    if combined is not None:
        return combined.flattened if combined.mode == "sequential" else [combined]
    if isinstance(loaders, (list, tuple)) and not loaders:
        return []
    return list(_leaves(loaders))


def combined_length(mode: str, lengths: Sequence[int | None]) -> int | None:
    """Batches of loaders that have so many each; None: not known before they end."""
    known = [length for length in lengths if length is not None]
    if len(known) < len(lengths):
        return None
    if mode == "sequential":
        return sum(known)
    if mode == "min_size" or (mode == "max_size_cycle" and 0 in known):
        return min(known)
    return max(known)


def _is_container(loaders: Any) -> bool:
    """Whether it holds loaders rather than batches: a list of tensors is one loader, and so is a dict of them."""
    if isinstance(loaders, Mapping):
        items: list[Any] = list(loaders.values())
    elif isinstance(loaders, (list, tuple)):
        items = list(loaders)
    else:
        return False
    return bool(items) and all(_is_loader(item) for item in items)


def _is_loader(item: Any) -> bool:
    if isinstance(item, DataLoader):
        return True
    if isinstance(item, Mapping):
        return _is_container(item)
    return hasattr(item, "__iter__") and not isinstance(item, (torch.Tensor, str, bytes)) and not hasattr(item, "shape")


def _leaves(loaders: Any) -> Iterator[Any]:
    if not _is_container(loaders):
        yield loaders
        return
    for item in loaders.values() if isinstance(loaders, Mapping) else loaders:
        yield from _leaves(item)


def _formed(loaders: Any, batches: Iterator[Any]) -> Any:
    if not _is_container(loaders):
        return next(batches)
    if isinstance(loaders, Mapping):
        return {key: _formed(item, batches) for key, item in loaders.items()}
    made = [_formed(item, batches) for item in loaders]
    if isinstance(loaders, tuple):
        kind: Any = type(loaders)
        return kind(*made) if hasattr(loaders, "_fields") else tuple(made)
    return made
