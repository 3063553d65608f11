"""What a resumed run needs besides the data cursor (epoch, batch) to read what an undisturbed one reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Sampler

from raytrainer.data.changed_collections import differ
from raytrainer.data.held_objects import STREAMS, library_of
from raytrainer.data.known_samplers import is_torchs
from raytrainer.data.memories import (
    Memory,
    from_store,
    has_generators,
    has_state,
    recall,
    remembered,
    seed_own_generators,
    to_store,
)
from raytrainer.data.own_generators import put_back, states_of
from raytrainer.data.own_readers import reads_plainly
from raytrainer.data.reading_alike import Order
from raytrainer.data.sharding import ShardedBatches
from raytrainer.data.shared_streams import SharedStream, is_shared
from raytrainer.data.streams import LoaderStream, stream_of
from raytrainer.data.web_pipelines import shuffling_steps, tell_steps
from raytrainer.errors import CheckpointError
from raytrainer.plan.seeds import derive_seed
from raytrainer.plan.steps_and_epochs import Past
from raytrainer.seeding import capture_rng, restore_rng

__all__ = ["EpochState", "of_all_workers"]

log = logging.getLogger("raytrainer")

#: What `EpochState.keep` notes, where it has not; "ahead" is where generators were before the batch read ahead.
_KEPT: dict[str, Any] = {"batch": 0, "rng": None, "stream": None, "ahead": []}


class EpochState:
    """The state of one loader on one worker.

    Three things: where a stream is, as of the last batch handed out; where the generators were before the next batch
    was read ahead; and what samplers, loader and dataset have counted up to this epoch's beginning.

    Args:
        loader: A copy of the user's loader, or the user's iterable.
        batches: What decides on a DataLoader's batches, if anything does.
        seed: The run's seed.

    Attributes:
        order: Watches a loader of the user's own making.
        started: Whether the epoch has been drawn.
    """

    def __init__(self, loader: Any, batches: ShardedBatches | None, seed: int) -> None:
        self.stream, self.seed = stream_of(loader), seed
        self._shuffling = shuffling_steps(loader)
        self._batches = batches
        self.order: Order | None = None
        self._apart = False
        self._roots = _remembering(loader, batches)
        self._new = [remembered(root) for root in self._roots]
        self._began: list[Memory] = [{} for _ in self._roots]
        self._drawing = _drawing(loader)
        self._unseen = _counts_unseen(loader)
        self._epoch, self.started = 0, False
        self._kept: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None
        self._ended: Any = None  # the state of a stream that counts epochs itself, in the epoch before
        self._rng: dict[str, Any] | None = None

    @property
    def in_order(self) -> bool:
        """Whether a loader can begin at any batch: those that were given are the first that it has asked for."""
        return not self._apart

    # ---------------------------------------------------------------- an epoch

    def begin(self, epoch: int) -> None:
        """An epoch begins, or goes on: put back what a resumed run's objects had counted by then."""
        self._epoch, self._kept, self.started = epoch, None, False
        found = self._resumed
        if found is None:
            return
        if epoch > 0 and self._unseen:
            self._unseen = False
            log.warning(
                "The loader's processes persist, and what its dataset, a stream, counts in them is not known here: if "
                "its order depends on that, a resumed run reads other samples. Give it set_epoch(epoch), or state_dict "
                "and load_state_dict; or leave persistent_workers out."
            )
        memories = {found["epoch"]: found["began"], found["epoch"] + 1: found["now"]}.get(epoch)
        if memories is not None and len(memories) == len(self._roots):
            for root, memory in zip(self._roots, memories, strict=True):
                recall(root, memory)
        if epoch in (found["epoch"], found["epoch"] + 1):
            put_back(self._drawing, found.get("drawn", ()))
        if epoch != found["epoch"]:
            self._resumed = None
            follows = (
                epoch == found["epoch"] + 1 and isinstance(self.stream, LoaderStream) and self.stream.counts_epochs
            )
            if follows and not found.get("anew"):
                self._ended = found["stream"]

    def starts(self) -> None:
        """Right before the order of the epoch is drawn, or its loader is iterated."""
        if not self.started:
            self.started = True
            self._began = self._memories()
            if self._shuffling:
                tell_steps(self._shuffling, self._epoch, derive_seed(self.seed, "stream", self._epoch))
            for root in self._roots:
                # those of samplers are seeded when they draw
                if not isinstance(root, (Sampler, DataLoader)) and library_of(root) not in STREAMS:
                    seed_own_generators(root, derive_seed(self.seed, "stream", self._epoch))

    def goes_on(self, epoch: int) -> bool:
        """Whether a stream of all workers is to go on within `epoch`, however many of them began it."""
        found = self._resumed
        in_epoch = found is not None and found["epoch"] == epoch and found["stream"] is not None
        return in_epoch and isinstance(self.stream, SharedStream)

    def resume(self, epoch: int, skip: int, before: Past = ()) -> int:
        """Put the stream back for an epoch that goes on at batch `skip`; return the batch that it is at.

        `before` is what groups of other sizes have done of it.
        """
        position = self._put_back(epoch, skip, before)
        if isinstance(self.stream, SharedStream):
            self.stream.place()
        return position

    def _put_back(self, epoch: int, skip: int, before: Past) -> int:
        shared = self.stream if self.goes_on(epoch) else None
        found, self._resumed, self._rng = self._resumed, None, None
        self._apart = found is not None and found["epoch"] == epoch and bool(found.get("apart"))
        if self.stream is not None:
            self.stream.begin(epoch)
        if self._ended is not None and isinstance(self.stream, LoaderStream):
            self.stream.follow(from_store(self._ended, self.stream.owner))
        self._ended = None
        if found is None or found["epoch"] != epoch:
            return 0
        self._compare(found.get("order"))
        if isinstance(shared, SharedStream) and found.get("others"):
            further = before[-1][1] - found["batch"] if before else 0
            state = shared.load(from_store(found["stream"], shared.owner), further)
            self._kept = _KEPT | {"stream": to_store(state, shared.owner)}
        if found.get("others"):
            return 0
        if not (0 if shared is not None else 1) <= found["batch"] <= skip:
            return 0
        if found.get("anew"):
            return skip
        self._kept = {name: found.get(name, nothing) for name, nothing in _KEPT.items()}
        if found["batch"] == skip:
            self._rng = found["rng"]
        if self.stream is None or found["stream"] is None:
            return 0
        self.stream.load(from_store(found["stream"], self.stream.owner))
        return int(found["batch"])

    def _compare(self, order: int | None) -> None:
        """Say so where a sampler has drawn another order than in the run that this one goes on from."""
        batches = self._batches
        if order is None or batches is None or batches.order_sum() in (None, order) or batches.rank:
            return
        log.warning(
            "%s has drawn another order for this epoch than the run that goes on here had: some samples will come "
            "twice and others not at all. Unless data or settings are others now, its order depends on what cannot be "
            "found in it, such as a generator of its module: make that an attribute, draw from (seed, epoch) with "
            "set_epoch(epoch), or give it state_dict and load_state_dict.", type(batches.users).__name__,
        )  # fmt: skip

    def counts(self, position: int) -> list[int]:
        """Batches that each of the loader's processes has made before."""
        stream = self.stream
        if stream is None:
            return []
        if stream.kind == "processes":
            return list(getattr(stream, "counts", ()))
        return [-(-max(0, position - process) // stream.processes) for process in range(stream.processes)]

    def read(self, iterator: Iterator[Any]) -> Iterator[Any]:
        return iterator if self.stream is None else self.stream.read(iterator)

    def about_to_read(self) -> None:
        """The batch after the cursor is read next, with the generators as they were when it was read before."""
        if self._rng is not None and self._kept is not None:
            restore_rng(self._rng)
            put_back(self._drawing, self._kept["ahead"])
            self._rng = None

    # ---------------------------------------------------------------- state

    def keep(self, batch: int) -> None:
        """So many batches of the epoch have been read, all of which are handed out by now: see `LookAhead`."""
        stream = None
        if self.stream is not None:
            try:
                state = self.stream.state()
                stream = None if state is None else to_store(state, self.stream.owner)
            except CheckpointError as error:
                log.warning("A resumed run will read this epoch again up to where it was: %s", error)
                self.stream = None if self.stream.kind != "processes" else self.stream
        self._kept = {"batch": batch, "rng": capture_rng(), "stream": stream, "ahead": states_of(self._drawing)}

    def state(self) -> dict[str, Any] | None:
        now = self._memories()
        order = self._batches.order_sum() if self._batches is not None and self.started else None
        apart = self._apart or (self.order is not None and not self.order.kept)
        drawn = states_of(self._drawing)
        if self._kept is None and not any([*self._began, *now, *drawn, apart]) and order is None:
            return None
        stream = self.stream
        form = None if stream is None else [stream.kind, stream.processes]
        return {
            "epoch": self._epoch,
            "began": self._began,
            "now": now,
            "order": order,
            "apart": apart,
            "drawn": drawn,
            "form": form,
            **(self._kept or _KEPT),
        }

    def take(self, state: dict[str, Any] | None, stage: str) -> None:
        if state is None:
            return
        state = dict(state)
        stream = self.stream
        form = None if stream is None else [stream.kind, stream.processes]
        if state["stream"] is not None and list(state["form"]) != form:
            log.warning(
                "The %s loader's state was taken with %s loader process(es) by %s, and does not fit what there is now; "
                "the epoch begins anew.", stage, state["form"][1], state["form"][0],
            )  # fmt: skip
            state["anew"] = True
        elif isinstance(stream, SharedStream) and state["stream"] is not None:
            stream.remember(from_store(state["stream"], stream.owner))
        self._resumed = state

    def _memories(self) -> list[Memory]:
        return [remembered(root, new) for root, new in zip(self._roots, self._new, strict=True)]


def _drawing(loader: Any) -> list[Any]:
    """What makes samples and batches here, one when it is asked for, and may draw from generators of its own for that.

    A loader's processes have copies of these, which are seeded with each batch.
    """
    if not isinstance(loader, DataLoader) or loader.num_workers or not reads_plainly(loader):
        return []
    return [] if isinstance(loader.dataset, IterableDataset) else [loader.dataset, loader.collate_fn]


def _counts_unseen(loader: Any) -> bool:
    """Whether a stream may count epochs in processes that persist, which would not be heard of here."""
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return False
    dataset = loader.dataset
    if not isinstance(dataset, IterableDataset) or library_of(dataset) in STREAMS or is_shared(dataset):
        return False
    restarted = has_state(dataset) or has_generators(dataset) or callable(getattr(dataset, "set_epoch", None))
    return not restarted and not has_state(loader) and bool(remembered(dataset))


def of_all_workers(states: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """What another number of workers can go on with, of what `EpochState.state` gave on each; None: nothing.

    A stream of all workers together goes on. What samplers and loaders have counted does where it is the same on all.
    """
    first = states[0]
    if first is None or "began" not in first:
        return None
    alike = all(
        state is not None and not any(differ(state[name], first[name]) for name in ("epoch", "began", "now"))
        for state in states
    )
    memories: dict[str, Any] = {"drawn": [], "ahead": [], **({} if alike else {"began": [], "now": []})}
    if (first["form"] or [None])[0] == SharedStream.kind:
        return {**first, **memories, "others": True, "order": None}
    return {**first, **memories, "others": True, "order": None, "stream": None, "rng": None} if alike else None


def _remembering(loader: Any, batches: ShardedBatches | None) -> list[Any]:
    """What of a user's may count epochs: samplers, a dataset that is a stream, a loader of an own class."""
    roots = [] if library_of(loader) in ("torch", "torchdata", "builtins") else [loader]
    if batches is not None and not is_torchs(batches.users):
        roots.append(batches.users)
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        roots.append(loader.dataset)
    return roots
