"""Reading one batch ahead, where the last one is not known otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["END", "LookAhead"]

#: Stands for the batch after the last.
END: Any = object()


class LookAhead(Iterator[Any]):
    """Reads one batch ahead, so that the last one is known when it is handed out.

    With `agree`, the end comes for all workers as soon as it comes for one.

    Args:
        iterator: What to read.
        agree: Asks all workers whether there is another batch.
        keep: Called with the number of batches handed out by then, the next one included, when all of these but no
            more have been read, while `keeping` is set.
        handed: Batches of the epoch that were handed out before.

    Attributes:
        leaves: Whether there is another batch here, as the end has come for another worker.
        keeping: Whether what is handed out next may be the last batch before the source's state is asked for.
    """

    def __init__(
        self,
        iterator: Iterator[Any],
        agree: Callable[[bool], bool] | None,
        keep: Callable[[int], None] | None = None,
        handed: int = 0,
    ) -> None:
        self.iterator, self.agree, self.keep, self.handed = iterator, agree, keep, handed
        self.keeping = self.leaves = False
        self.ended = False  # here, rather than for another worker
        self.ahead = self._read()

    def _read(self) -> Any:
        item = next(self.iterator, END)
        self.ended = item is END
        if self.agree is not None and not self.agree(item is not END):
            self.leaves = item is not END
            return END
        return item

    @property
    def is_last(self) -> bool:
        """Whether the batch handed out latest was the last."""
        return self.ahead is END

    def __next__(self) -> Any:
        if self.ahead is END:
            raise StopIteration
        self.handed += 1
        if self.keeping and self.keep is not None:
            self.keep(self.handed)
        item, self.ahead = self.ahead, self._read()
        return item
