"""`RunData`: where a run's batches come from on one worker, and how they get to the device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from raytrainer.data.combined_feed import CombinedFeed, make_feed
from raytrainer.data.combined_loader import as_combined, as_list
from raytrainer.data.data_hooks import DataHooks
from raytrainer.data.feed import Feed
from raytrainer.data.prefetch import CopyStream
from raytrainer.errors import ConfigurationError
from raytrainer.plan.seeds import derive_seed
from raytrainer.seeding import capture_rng, rng_untouched, same_rng, seed_generators
from raytrainer.strategies.strategy import Strategy
from raytrainer.task import Task
from raytrainer.worker.hook_calls import Hooks, overridden
from raytrainer.worker.logger_recorder import TRANSFER_HOOKS

if TYPE_CHECKING:
    from raytrainer.data.ray.ray_feed import RayFeed

__all__ = ["AnyFeed", "RunData"]

log = logging.getLogger("raytrainer")

AnyFeed: TypeAlias = "Feed | CombinedFeed | RayFeed"


class RunData:
    """The loaders and datasets of one run.

    Args:
        task: What the driver sent.
        strategy: Says which part of the data is this worker's.
    """

    def __init__(self, task: Task, strategy: Strategy) -> None:
        self.task, self.strategy = task, strategy
        self._owners = task.datamodule, task.module
        self._feeds: dict[str, list[AnyFeed]] = {}
        self._sources: dict[str, Any] = dict(task.loaders)
        self._states: list[dict[str, Any] | None] = []
        self.epoch: Callable[[], int] = lambda: 0  # the epoch in progress; before training the first
        self._drawn: set[str] = set()  # stages whose hook has drawn random numbers
        self._outdated: set[str] = set()  # stages whose loaders are to be made anew when next needed

    def bind_transfer(self, hooks: Hooks, cast: Callable[[Any], Any] | None) -> Callable[[Any, int], Any] | None:
        """The three batch-transfer hooks and the precision's `cast` as one function; None if nothing is to be done."""
        device = self.strategy.device
        found = {name: self._data_hook(name) for name in TRANSFER_HOOKS}
        before, to_device, after = (hook and _giving(hooks.named(name, hook), name) for name, hook in found.items())
        if device.type != "cpu" and to_device is None:
            to_device = CopyStream(device) if device.type == "cuda" else DataHooks().transfer_batch_to_device
        if before is None and to_device is None and after is None:
            return None if cast is None else lambda batch, idx: cast(batch)

        def transfer(batch: Any, idx: int) -> Any:
            if before is not None:
                batch = before(batch, idx)
            if cast is not None:
                batch = cast(batch)
            if to_device is not None:
                batch = to_device(batch, device, idx)
            return after(batch, idx) if after is not None else batch

        return transfer

    def _data_hook(self, name: str) -> Callable[..., Any] | None:
        """The hook of whoever overrode it: the DataModule wins."""
        for owner in self._owners:
            if owner is not None and overridden(owner, name):
                hook: Callable[..., Any] = getattr(owner, name)
                return hook
        return None

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation loader or dataset, and a step for it."""
        given = "val" in self._sources or "val" in self.task.datasets
        loader = given or self._data_hook("val_dataloader") is not None
        return loader and overridden(self.task.module, "validation_step")

    def loader(self, stage: str) -> Any:
        if stage in self.task.datasets:
            return [blocks.source for blocks in self.task.datasets[stage]]
        if stage not in self._sources:
            hook = self._data_hook(f"{stage}_dataloader")
            if hook is None:
                raise ConfigurationError(
                    f"no {stage} loader: pass one, or write {stage}_dataloader() in the DataModule or Module."
                )
            before = capture_rng()
            if self.strategy.share.count > 1:
                with rng_untouched():
                    seed_generators(self._seed_of_hook(stage))
                    self._sources[stage] = hook()
            else:
                self._sources[stage] = hook()
            if not same_rng(before, capture_rng()):
                self._drawn.add(stage)
        return self._sources[stage]

    def _seed_of_hook(self, stage: str) -> int:
        """What a loader hook draws is the same on all workers, so that each takes its part of the same dataset."""
        every = self.task.settings.reload_dataloaders_every_n_epochs
        return derive_seed(self.task.seed, "loaders", stage, self.epoch() // every if every else 0)

    def make_anew(self, stage: str) -> None:
        """Call the stage's hook once more when its loaders are next needed."""
        self._outdated.add(stage)

    def feeds(self, stage: str) -> list[AnyFeed]:
        """The loaders of "train", "val", "test" or "predict", sharded; built once."""
        outdated = stage in self._outdated
        self._outdated.discard(stage)
        if outdated and stage not in self.task.loaders and stage not in self.task.datasets:
            self._sources.pop(stage, None)
            self._close_feeds(stage)
            if stage == "train":
                self._states = []  # of the loader before
        if stage not in self._feeds and stage in self.task.datasets:
            self._feeds[stage] = self._dataset_feeds(stage)
        if stage not in self._feeds:
            source = self.loader(stage)
            combined = as_combined(source) if stage == "train" else None
            loaders = as_list(source) if combined is None else [combined]
            if not loaders and stage != "train":
                if self.strategy.ranks.rank == 0:
                    log.warning("There is no %s loader: the list of them is empty. This stage does nothing.", stage)
            elif not loaders:
                given = f"the {stage} loader is" if stage in self.task.loaders else f"{stage}_dataloader() returned"
                raise ConfigurationError(f"{given} {source!r}: give a DataLoader, or any iterable of batches.")
            seed, settings, share = self.task.seed, self.task.settings, self.strategy.share
            feeds = [make_feed(loader, stage, share, seed, settings, self.epoch()) for loader in loaders]
            self._feeds[stage] = [*feeds]
            for feed, state in zip(feeds, self._states, strict=False) if stage == "train" else ():
                feed.take_state(state)
        return self._feeds[stage]

    def states(self) -> list[dict[str, Any] | None]:
        """What training goes on from besides the cursor, loader by loader."""
        feeds = self._feeds.get("train")
        return self._states if feeds is None else [feed.state() for feed in feeds]

    def take_states(self, states: list[dict[str, Any] | None]) -> None:
        """Go on from what `states` gave, once there are training loaders."""
        self._states = states

    def forget_drawn(self, stage: str) -> None:
        """Have the stage's hook called anew when next needed, if it has drawn random numbers."""
        if stage in self._drawn:
            self._drawn.remove(stage)
            self._sources.pop(stage, None)
            self._close_feeds(stage)

    def _close_feeds(self, stage: str) -> None:
        for feed in self._feeds.pop(stage, []):
            if isinstance(feed, (Feed, CombinedFeed)):
                feed.close()

    def _dataset_feeds(self, stage: str) -> list[AnyFeed]:
        from raytrainer.data.ray.ray_feed import RayFeed

        seed, settings, share = self.task.seed, self.task.settings, self.strategy.share
        return [RayFeed(blocks, stage, share, seed, settings) for blocks in self.task.datasets[stage]]

    def lengths(self, stage: str) -> Any:
        lengths = [feed.length for feed in self.feeds(stage)]
        return lengths[0] if stage == "train" else lengths

    def length_in(self, epoch: int) -> int | None:
        """Training batches of another epoch."""
        return self.feeds("train")[0].length_in(epoch)

    def close(self) -> None:
        """End what loaders have begun."""
        for stage in list(self._feeds):
            self._close_feeds(stage)


def _giving(hook: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A hook that must return a batch: where it forgets to, each batch would be left out without a word."""

    def called(*args: Any) -> Any:
        batch = hook(*args)
        if batch is None:
            raise ConfigurationError(f"{name} returned None: return the batch, changed or not.")
        return batch

    return called
