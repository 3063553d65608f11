"""`CombinedFeed`: several feeds as one, as a `CombinedLoader` says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from raytrainer.data.combined_iterator import CombinedIterator, Track
from raytrainer.data.combined_loader import CombinedLoader, combined_length
from raytrainer.data.feed import Feed
from raytrainer.data.first_batches import Fingerprint
from raytrainer.data.own_sharding import remedy
from raytrainer.data.sharding import Share
from raytrainer.errors import DataError
from raytrainer.plan.settings import Settings
from raytrainer.plan.steps_and_epochs import Past, batches_before, resolve_limit

__all__ = ["CombinedFeed", "make_feed"]

log = logging.getLogger("raytrainer")


def make_feed(loader: Any, stage: str, share: Share, seed: int, settings: Settings, epoch: int = 0) -> AnyFeed:
    """The feed of a loader, or of several in a `CombinedLoader`."""
    kind: type[Feed] | type[CombinedFeed] = CombinedFeed if isinstance(loader, CombinedLoader) else Feed
    return kind(loader, stage, share, seed, settings, epoch)


class CombinedFeed:
    """Several loaders on one worker. A feed each reads them; what is written here is how their batches come together.

    A pass is one reading of a loader from its beginning to its end. With "max_size_cycle" an epoch may take several of
    a short loader, and each is an epoch of its own to that loader, so that it is in another order.

    Args and attributes are those of `Feed`.
    """

    def __init__(
        self, loader: CombinedLoader, stage: str, share: Share, seed: int, settings: Settings, epoch: int = 0
    ) -> None:
        self.source, self.stage, self.share, self.settings = loader, stage, share, settings
        self.mode, loaders = loader.mode, loader.flattened
        unlimited: dict[str, Any] = {f"limit_{stage}_batches": 1.0}  # the limit is one on what comes of them together
        whole = replace(settings, **unlimited)
        self.feeds: list[AnyFeed] = [make_feed(part, stage, share, seed, whole, epoch) for part in loaders]
        self.ends_unannounced: bool = any(feed.ends_unannounced for feed in self.feeds)
        pairs = zip(loaders, self.feeds, strict=True)
        unknown: list[Any] = [part for part, feed in pairs if isinstance(feed.watched, Fingerprint)]
        self.watched: Fingerprint | None = Fingerprint(stage, share.index, remedy(unknown[0])) if unknown else None
        self.may_miss: bool = self.mode == "sequential" and any(feed.may_miss for feed in self.feeds)
        empty: list[bool] = [feed.nothing for feed in self.feeds]
        self.nothing: bool = any(empty) if self.mode in ("min_size", "max_size_cycle") else all(empty)
        self.length: int | None = None
        self._epoch = epoch
        self._before: Past = ()
        self._reading: CombinedIterator | None = None
        self._resumed: dict[str, Any] | None = None
        self._measure()

    def refuse_nothing(self, epoch: int) -> None:
        """The loaders ended before the first batch of a training epoch, which would otherwise train for ever."""
        raise DataError(
            f"the {self.stage} loaders (CombinedLoader, {self.mode!r}) gave no batch to rank {self.share.index} of "
            f"{self.share.count} in epoch {epoch}: one of them is empty, or can be read once only."
        )

    # ---------------------------------------------------------------- an epoch's batches

    def begin(self, epoch: int, before: Past = ()) -> None:
        """See `Feed.begin`."""
        self._epoch, self._before, self._reading = epoch, before, None
        found = self._resumed
        if found is not None and found["epoch"] not in (epoch, epoch - 1):
            found = self._resumed = None
        alike = self.mode in ("min_size", "max_size")
        if before and not alike:
            log.warning(
                "The %s loaders are read with %r, and their epoch was begun by another number of workers: the epoch "
                "begins anew.", self.stage, self.mode,
            )  # fmt: skip
        for number, feed in enumerate(self.feeds):
            # where a run goes on within a later pass, the feed's state is of that one
            at = 0 if found is None or found["epoch"] != epoch else int(found["passes"][number])
            feed.begin(self.of_pass(number, at), self._before_of(feed) if alike else ())
        self._measure()

    @property
    def batch_size(self) -> int | None:
        """Samples of all loaders in a batch; None where that is not known, or not the same in all batches."""
        sizes = [feed.batch_size for feed in self.feeds]
        known = [size for size in sizes if size]
        return sum(known) if len(known) == len(sizes) and self.mode in ("min_size", "max_size") else None

    def _before_of(self, feed: AnyFeed) -> Past:
        """What groups of other sizes have done, in batches of one loader: of the same share of all samples as now."""
        size, whole = feed.batch_size, self.batch_size
        if not size or not whole:
            return self._before
        return [(parts, batches, past[0] * size // whole if past else 0) for parts, batches, *past in self._before]

    @property
    def divisible(self) -> bool:
        """See `Feed.divisible`."""
        return self.mode in ("min_size", "max_size") and all(feed.divisible for feed in self.feeds)

    def draw(self) -> int | None:
        """See `Feed.draw`."""
        for feed in self.feeds:
            feed.draw()
        self._measure()
        return self.length

    def length_in(self, epoch: int) -> int | None:
        """See `Feed.length_in`."""
        return self._limited([feed.length_in(epoch) for feed in self.feeds])

    def _measure(self) -> None:
        self.length = self._limited([feed.length for feed in self.feeds])

    def _limited(self, lengths: list[int | None]) -> int | None:
        own = combined_length(self.mode, lengths)
        limit = resolve_limit(f"limit_{self.stage}_batches", self.settings.limit(self.stage), own)
        offset, count = batches_before(self._before, self.batch_size), self.share.count
        if limit is not None and offset and self.settings.limit(self.stage) != 1.0:
            limit = max(0, -(-(limit * count - offset) // count))
        return own if limit is None else limit if own is None else min(own, limit)

    def of_pass(self, number: int, at: int) -> int:
        """The epoch that pass `at` of this epoch is to a loader: they count on, where lengths are known."""
        if self.mode != "max_size_cycle":
            return self._epoch
        lengths = [feed.length for feed in self.feeds]
        known, own = [length for length in lengths if length], lengths[number]
        if len(known) < len(lengths) or not own:
            return self._epoch + at * 1_000_003
        return self._epoch * -(-max(known) // own) + at

    # ---------------------------------------------------------------- reading

    def start(self, epoch: int, skip: int = 0, agree: Callable[[bool], bool] | None = None) -> Iterator[Any]:
        """See `Feed.start`."""
        if epoch != self._epoch:
            self.begin(epoch)
        found, self._resumed = self._resumed, None
        if found is not None and found["epoch"] == epoch and found["batch"] == skip:
            places: Any = list(zip(found["passes"], found["read"], found["over"], strict=True))
        else:
            places = self._places(skip)
        replayed = skip if places is None else 0  # where only reading tells in which pass a loader is
        tracks = self._tracks()
        for number, track in enumerate(tracks):
            at, read, over = (0, 0, False) if places is None else places[number]
            track.place(int(at), int(read), bool(over))
        agreed = agree if self.ends_unannounced else None
        iterator = self._reading = CombinedIterator(self.source, tracks, agreed, skip - replayed)
        for _ in range(replayed):
            if next(iterator, None) is None and iterator.is_last:
                break
        return iterator

    def _tracks(self) -> list[Track]:
        return [Track(feed, partial(self.of_pass, number)) for number, feed in enumerate(self.feeds)]

    def _places(self, skip: int) -> list[tuple[int, int, bool]] | None:
        """(pass, batches read in it, whether it is over) of each loader after `skip` batches; None: reading tells."""
        lengths = [feed.length for feed in self.feeds]
        if skip and any(length is None for length in lengths) and self.mode != "min_size":
            return None
        places, left = [], skip
        for length in lengths:
            at, read = 0, skip if length is None else min(skip, length)
            if self.mode == "sequential":
                read = min(left, length or 0)
                left -= read
            elif self.mode == "max_size_cycle" and length and skip:
                at, read = (skip - 1) // length, (skip - 1) % length + 1
            places.append((at, read, read == length))
        return places

    def close(self) -> None:
        """See `Feed.close`."""
        self._reading = None
        for feed in self.feeds:
            feed.close()

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, Any] | None:
        """See `Feed.state`."""
        reading = self._reading
        if reading is None and self._resumed is not None:
            return self._resumed
        tracks = self._tracks() if reading is None else reading.tracks
        return {
            "epoch": self._epoch,
            "batch": 0 if reading is None else reading.handed,
            "passes": [track.at for track in tracks],
            "read": [track.read for track in tracks],
            "over": [track.begun and track.over for track in tracks],
            "parts": [feed.state() for feed in self.feeds],
        }

    def take_state(self, state: dict[str, Any] | None) -> None:
        """See `Feed.take_state`."""
        if state is None or len(state.get("parts", ())) != len(self.feeds):
            return
        self._resumed = state
        for feed, part in zip(self.feeds, state["parts"], strict=True):
            feed.take_state(part)


AnyFeed: TypeAlias = Feed | CombinedFeed
