"""When to train, validate and stop: the contract on epochs, steps and batches, as pure functions.

Which batches step, where gradients are accumulated, is decided in `worker/training_loop.py`.

All counts of batches are per worker; a step is one optimizer step. Steps take precedence over epochs, and a maximum
beats a minimum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raytrainer.errors import ConfigurationError
from raytrainer.plan.settings import Settings

__all__ = [
    "Past",
    "Progress",
    "batches_before",
    "batches_until_decision",
    "chunk_batches",
    "counted_in",
    "epoch_done",
    "is_done",
    "may_stop",
    "next_step_stop",
    "out_of_time",
    "rescale",
    "resolve_limit",
    "resolve_val_every",
    "samples_before",
    "size_of",
    "validation_due",
    "validation_follows",
]


#: What groups of other sizes have done of an epoch, in order: (parts that the data was dealt to, batches of each, their
#: size); a size that is not known is 0 or missing.
Past = Sequence[tuple[int, ...]]


def batches_before(before: Past, batch_size: int | None = None) -> int:
    """Batches that these groups have done, on all parts together; of so many samples, where both sizes are known."""
    if not batch_size:
        return sum(parts * batches for parts, batches, *_ in before)
    return samples_before(before, batch_size) // batch_size


def samples_before(before: Past, batch_size: int) -> int:
    """Samples that these groups have done; `batch_size` of the present one, for where theirs is not known."""
    return sum(parts * batches * size_of(past, batch_size) for parts, batches, *past in before)


def size_of(past: Sequence[int], batch_size: int) -> int:
    """A group's batch size, of what comes third in a `Past`."""
    return past[0] if past and past[0] else batch_size


def counted_in(state: Mapping[str, Any], parts: int) -> tuple[int, int]:
    """(parts of the data, batch size or 0) that the cursor of a run's state counts in."""
    return state.get("parts") or state.get("world_size", parts), state.get("batch_size") or 0


@dataclass
class Progress:
    """Where a run is. The data cursor is (epoch, batch).

    Attributes:
        epoch: Index of the epoch in progress.
        batch: Batches done in the epoch in progress.
        before: What groups of other sizes have done of the epoch in progress: (parts of the data, batches of each, and
            their size; 0 where that is not known).
        shift: The same in batches on each part of this group's, rounded down.
        total_batches: Batches done over all epochs.
        step: Optimizer steps done.
        row: The loggers' step of the batch done last; it counts batches that end in a step, as rows of batches do.
        seconds: Time since this `fit` began to train.
        epoch_ended: The epoch in progress has no batch left; only its end is to be done.
        validated_at: `total_batches` when the latest validation ran; -1 before any.
    """

    epoch: int = 0
    batch: int = 0
    before: tuple[tuple[int, ...], ...] = ()
    shift: int = 0
    total_batches: int = 0
    step: int = 0
    row: int = 0
    seconds: float = 0.0
    epoch_ended: bool = False
    validated_at: int = -1

    @property
    def completed(self) -> int:
        """Epochs whose batches are all done."""
        return self.epoch + self.epoch_ended

    def next_epoch(self) -> None:
        """The epoch in progress is over."""
        self.epoch, self.batch, self.epoch_ended = self.epoch + 1, 0, False
        self.before, self.shift = (), 0


def resolve_limit(name: str, limit: int | float, length: int | None) -> int | None:
    """Batches to use of a loader with `length` batches (None: unknown).

    An int is a number, a float a truncated fraction; None stands for "until it ends".

    Raises:
        ConfigurationError: A fraction of an unknown length, or one that rounds to no batch at all.
    """
    if isinstance(limit, int):
        return limit if length is None else min(limit, length)
    if limit == 0.0:
        return 0
    if length is None:
        if limit == 1.0:
            return None
        raise ConfigurationError(
            f"{name}={limit}: the loader has no length to take a fraction of; give a number of batches, 0 or 1.0."
        )
    batches = _fraction(limit, length)
    if batches == 0 and length > 0:
        raise ConfigurationError(
            f"{name}={limit} of a loader with {length} batches is no batch at all; give at least {1 / length:.3g}, or "
            f"a number of batches."
        )
    return batches


def resolve_val_every(settings: Settings, train_batches: int | None, shift: int = 0) -> int | None:
    """Training batches between validations; None: at the end of an epoch.

    Args:
        settings: The interval.
        train_batches: What an epoch has, or what is left of this one; None: unknown.
        shift: What groups of other sizes have done of this one, in batches of this group.

    Raises:
        ConfigurationError: More batches than an epoch has, or a fraction of an unknown length.
    """
    interval = settings.val_check_interval
    if isinstance(interval, int):
        by_epoch = settings.check_val_every_n_epoch is not None and not shift  # what is left of an epoch is none
        if by_epoch and train_batches is not None and interval > train_batches:
            raise ConfigurationError(
                f"val_check_interval={interval} is more than the {train_batches} training batches of an epoch; give at "
                f"most {train_batches}, or check_val_every_n_epoch=None to count batches across epochs."
            )
        return interval
    if interval == 1.0:
        return None
    if train_batches is None:
        raise ConfigurationError(
            f"val_check_interval={interval}: the training loader has no length to take a fraction of; give a number "
            f"of batches or 1.0."
        )
    return max(1, _fraction(interval, train_batches + shift))


def _fraction(share: float, length: int) -> int:
    # 100 * 0.29 is 28.999999999999996 in floating point, and means 29
    return int(length * share + 1e-9)


def epoch_done(progress: Progress, train_batches: int | None, exhausted: bool) -> bool:
    """Whether the epoch in progress has no batch left."""
    return exhausted or (train_batches is not None and progress.batch >= train_batches)


def may_stop(settings: Settings, progress: Progress) -> bool:
    """Whether a requested stop is honoured now: minima only delay it, and min_steps outranks min_epochs."""
    if settings.min_steps is not None:
        return progress.step >= settings.min_steps
    return progress.completed >= settings.min_epochs


def is_done(settings: Settings, progress: Progress, stop_requested: bool) -> bool:
    """Whether training is over."""
    if settings.max_steps is not None:
        if progress.step >= settings.max_steps:
            return True
    elif settings.max_epochs is not None and progress.completed >= settings.max_epochs:
        return True
    if out_of_time(settings, progress):
        return True
    return stop_requested and may_stop(settings, progress)


def out_of_time(settings: Settings, progress: Progress) -> bool:
    """Whether this `fit` has taken the time that it may."""
    return settings.max_time is not None and progress.seconds >= settings.max_time


def validation_due(settings: Settings, progress: Progress, val_every: int | None, at_epoch_end: bool) -> bool:
    """Whether a validation is due after the batches done so far."""
    every_n_epoch = settings.check_val_every_n_epoch
    begun = progress.batch > 0 or bool(progress.before)
    if progress.validated_at == progress.total_batches or not begun:
        return False
    if every_n_epoch is None:
        return progress.total_batches % (val_every or 1) == 0
    if (progress.epoch + 1) % every_n_epoch:
        return False
    if val_every is None:
        return at_epoch_end
    return progress.batch > 0 and (progress.batch + progress.shift) % val_every == 0


def validation_follows(
    settings: Settings, progress: Progress, batches: int, train_batches: int | None, val_every: int | None
) -> bool:
    """Whether one will be due within the epoch once so many `batches` more are done."""
    done = progress.batch + batches
    after = replace(progress, batch=done, total_batches=progress.total_batches + batches)
    if val_every is None or epoch_done(after, train_batches, False):
        return False
    return validation_due(settings, after, val_every, False)


def batches_until_decision(
    settings: Settings, progress: Progress, train_batches: int | None, val_every: int | None, most: int
) -> int:
    """How many batches to train before the driver must look again; at least 1, at most `most`."""
    bounds = [most]
    if train_batches is not None:
        bounds.append(train_batches - progress.batch)
    if val_every is not None:
        done = progress.total_batches if settings.check_val_every_n_epoch is None else progress.batch + progress.shift
        bounds.append(val_every - done % val_every)
    return max(1, min(bounds))


def next_step_stop(settings: Settings, progress: Progress, every: tuple[int, ...] = ()) -> int | None:
    """The next optimizer step at which the driver must look: a limit, or a multiple of one of `every`."""
    stops = [progress.step + n - progress.step % n for n in every]
    stops += [s for s in (settings.max_steps, settings.min_steps) if s is not None and s > progress.step]
    return min(stops, default=None)


def rescale(progress: Progress, before: tuple[int, int], now: tuple[int, int], divisible: bool = True) -> None:
    """Move the cursor within an epoch to a group of another size, which takes up what others have left of it.

    Args:
        progress: Has the cursor.
        before: What it counts in: (parts of the data, batch size; 0 if that is not known).
        now: What it is to count in. The same parts with another batch size are another size, if the epoch is
            `divisible`; a stream goes on from its state.
        divisible: Whether the rest of an epoch can be dealt out anew.
    """
    other_batches = divisible and 0 not in (before[1], now[1]) and before[1] != now[1]
    if (before[0] != now[0] or other_batches) and progress.batch and not progress.epoch_ended:
        progress.before = (*progress.before, (before[0], progress.batch, before[1]))
        progress.batch = 0
    progress.shift = batches_before(progress.before, now[1]) // now[0]


def chunk_batches(previous: int, seconds: float, target: float = 1.0) -> int:
    """Batches for a chunk of about `target` seconds, from the previous chunk's size and time.

    Grows at most sixteenfold at once, since a first chunk's time (compilation, cold caches) says little.
    """
    if previous <= 0:
        return 1
    rate = seconds / previous
    wanted = int(target / rate) if rate > 0 else previous * 16
    return max(1, min(wanted, previous * 16))
