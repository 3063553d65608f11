"""Streams whose place is one number for all workers, so that any number goes on from it: mosaicml-streaming's.

Its dataset deals samples out to workers and their loader processes from where the epoch was left, by all of them
together. It counts epochs in memory that its processes share, which begins at 0 in a new run; here it is told them.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader

from raytrainer.place_in_run import world_size

__all__ = ["SharedStream", "is_shared"]

#: What datasets were told last, which counts until they are in a later epoch.
_told: MutableMapping[Any, dict[str, Any]] = WeakKeyDictionary()


def is_shared(dataset: Any) -> bool:
    """Whether it is mosaicml-streaming's `StreamingDataset`, or a class derived from it."""
    kinds = type(dataset).__mro__
    return any(kind.__name__ == "StreamingDataset" and kind.__module__.startswith("streaming.") for kind in kinds)


class SharedStream:
    """Such a dataset in a loader of torch's or of the library's.

    What one worker writes into the shared memory, the others of its node read: so nothing is asked of the dataset
    between an epoch's beginning and `place`, and nothing is written where nothing is to be said.

    Args:
        loader: A copy of the user's.
    """

    kind = "shared"
    processes = 0  # however many there are

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset: Any = loader.dataset
        self.owner: Any = self.dataset
        alike = getattr(loader.dataset, "replication", None) or 1  # workers that read the same
        self._samples = (loader.batch_size or 1) * world_size() // alike  # of all, for each batch of one
        self._epoch = self._batches = self._offset = 0
        self._lasting: dict[str, Any] = {}
        self._beginning: dict[str, Any] | None = None

    def begin(self, epoch: int) -> None:
        """The next iteration is of this epoch, from its beginning."""
        self.dataset.next_epoch = self._epoch = epoch
        self._batches, self._offset, self._beginning = 0, 0, None
        told = _told.get(self.dataset)
        if self._lasting or (told is not None and told["epoch"] >= epoch):  # what was told would count
            self._go_on_from(self._lasting or told or {}, 0)
            self._lasting = {}

    def remember(self, state: Any) -> None:
        """Take from a state of any epoch what makes the order of all: it comes of the nodes that the run began with."""
        self._lasting = state["dataset"]

    def load(self, state: Any, further: int = 0) -> Any:
        """Go on from a state, `further` batches of those that it was taken of later; return the state there."""
        self._go_on_from(state["dataset"], state["dataset"]["sample_in_epoch"] + further * state["samples"])
        return {"dataset": self._beginning, "samples": self._samples}

    def _go_on_from(self, state: dict[str, Any], done: int) -> None:
        self._batches, self._offset = 0, done
        self._beginning = {**state, "epoch": self._epoch, "sample_in_epoch": done}

    def place(self) -> None:
        """Tell the dataset where to begin, now that it is known."""
        if self._beginning is not None:
            self.dataset.load_state_dict(self._beginning)
            _told[self.dataset] = self._beginning

    def state(self) -> Any:
        done = self._offset + self._batches * self._samples
        state = {**self.dataset.state_dict(done, True), "epoch": self._epoch, "sample_in_epoch": done}
        return {"dataset": state, "samples": self._samples}

    def read(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Count what is read."""
        for batch in iterator:
            self._batches += 1
            yield batch
