"""Design §4 as tables: what is trained, when validation runs, when a run is over."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raytrainer.errors import ConfigurationError
from raytrainer.plan import steps_and_epochs as schedule
from raytrainer.plan.settings import Settings, build_settings
from raytrainer.plan.steps_and_epochs import Progress


def walk(settings: Settings, batches: int | None, chunk: int = 7, stop_at_batch: int | None = None):
    """Drive the pure functions as the coordinator does, without any training.

    Returns:
        Events: "t<n>" for n batches in a row within an epoch, "v" for a validation, "|" for the end of an epoch.
    """
    progress, events, stop = Progress(), [], False
    loader_ends_after = batches if batches is not None else 10  # what a loader of unknown length turns out to have

    def note(count: int) -> None:
        if events and isinstance(events[-1], int):
            events[-1] += count
        elif count:
            events.append(count)

    while not schedule.is_done(settings, progress, stop):
        val_every = schedule.resolve_val_every(settings, batches)
        while not progress.epoch_ended:
            wanted = schedule.batches_until_decision(settings, progress, batches, val_every, chunk)
            at_step = schedule.next_step_stop(settings, progress)
            assert 1 <= wanted <= chunk
            done, exhausted = 0, False
            while done < wanted:
                if progress.batch >= loader_ends_after:
                    exhausted = True
                    break
                progress.batch, progress.total_batches, done = progress.batch + 1, progress.total_batches + 1, done + 1
                last = batches is not None and progress.batch == batches
                progress.step += last or progress.batch % settings.accumulate_grad_batches == 0
                stop |= progress.total_batches == stop_at_batch
                if at_step is not None and progress.step >= at_step:
                    break
            note(done)
            progress.epoch_ended = schedule.epoch_done(progress, batches, exhausted)
            due = schedule.validation_due(settings, progress, val_every, progress.epoch_ended)
            honoured = stop and schedule.may_stop(settings, progress)
            if due or (honoured and progress.validated_at != progress.total_batches):
                progress.validated_at = progress.total_batches
                events.append("v")
            if schedule.is_done(settings, progress, stop):
                break
        if progress.epoch_ended:
            events.append("|")
            progress.next_epoch()
    return " ".join(map(str, events))


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("options", "batches", "expected"),
    [
        # the end of an epoch
        ({"max_epochs": 2}, 10, "10 v | 10 v |"),
        ({"max_epochs": 2, "val_check_interval": 1.0}, 10, "10 v | 10 v |"),
        # an int is a number of batches, counted anew in each epoch; none is added at the end
        ({"max_epochs": 2, "val_check_interval": 4}, 10, "4 v 4 v 2 | 4 v 4 v 2 |"),
        ({"max_epochs": 1, "val_check_interval": 1}, 3, "1 v 1 v 1 v |"),
        ({"max_epochs": 2, "val_check_interval": 10}, 10, "10 v | 10 v |"),
        # a float is a fraction, truncated, at least one batch
        ({"max_epochs": 1, "val_check_interval": 0.3}, 10, "3 v 3 v 3 v 1 |"),
        ({"max_epochs": 1, "val_check_interval": 0.5}, 5, "2 v 2 v 1 |"),
        ({"max_epochs": 1, "val_check_interval": 0.01}, 3, "1 v 1 v 1 v |"),
        ({"max_epochs": 1, "val_check_interval": 0.29}, 100, "29 v 29 v 29 v 13 |"),
        # every n-th epoch
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, 3, "3 | 3 v | 3 | 3 v |"),
        ({"max_epochs": 3, "check_val_every_n_epoch": 2, "val_check_interval": 2}, 5, "5 | 2 v 2 v 1 | 5 |"),
        # over all epochs
        (
            {"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 12},
            10,
            "10 | 2 v 8 | 4 v 6 |",
        ),
        ({"max_epochs": 2, "check_val_every_n_epoch": None, "val_check_interval": 5}, 10, "5 v 5 v | 5 v 5 v |"),
        # an unknown length
        ({"max_epochs": 2}, None, "10 v | 10 v |"),
        ({"max_epochs": 1, "val_check_interval": 4}, None, "4 v 4 v 2 |"),
        ({"max_epochs": 2, "check_val_every_n_epoch": None, "val_check_interval": 8}, None, "8 v 2 | 6 v 4 |"),
        # counting is in batches, also when accumulating
        ({"max_epochs": 1, "val_check_interval": 3, "accumulate_grad_batches": 4}, 10, "3 v 3 v 3 v 1 |"),
        # steps take precedence over epochs, and end in the middle of one
        ({"max_steps": 13}, 10, "10 v | 3"),
        ({"max_steps": 13, "max_epochs": 1}, 10, "10 v | 3"),
        ({"max_steps": 20}, 10, "10 v | 10 v |"),
        ({"max_steps": 3, "accumulate_grad_batches": 4}, 10, "10 v |"),
        ({"max_steps": 4, "accumulate_grad_batches": 4}, 10, "10 v | 4"),
        ({"max_steps": 4, "val_check_interval": 4}, 10, "4 v"),
        # 0 trains nothing and returns
        ({"max_epochs": 0}, 10, ""),
        ({"max_steps": 0}, 10, ""),
        ({"max_steps": 0, "min_steps": 5}, 10, ""),
        ({"max_epochs": 0, "min_epochs": 5}, 10, ""),
        ({"max_steps": 3, "min_steps": 100}, 10, "3"),
    ],
)
def test_walks(options, batches, expected, chunk):
    assert walk(build_settings(**options), batches, chunk) == expected


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize(
    ("options", "stop_at_batch", "expected"),
    [
        # an early stop ends the epoch at the next decision and validates once
        ({"max_epochs": 9, "min_epochs": 0}, 6, "6 v"),
        ({"max_epochs": 9, "min_epochs": 0}, 10, "10 v |"),
        ({"max_epochs": 9, "min_epochs": 0, "val_check_interval": 6}, 6, "6 v"),
        # min_epochs [1] delays it
        ({"max_epochs": 9}, 6, "10 v |"),
        ({"max_epochs": 9, "min_epochs": 2}, 6, "10 v | 10 v |"),
        ({"max_epochs": 9, "min_epochs": 1}, 16, "10 v | 6 v"),
        # min_steps decides, whatever min_epochs says
        ({"max_epochs": 9, "min_steps": 8}, 2, "8 v"),
        ({"max_epochs": 9, "min_steps": 8, "min_epochs": 5}, 2, "8 v"),
        ({"max_epochs": 9, "min_steps": 14, "min_epochs": 1}, 2, "10 v | 4 v"),
        ({"max_epochs": 9, "min_steps": 0, "min_epochs": 5}, 2, "2 v"),
        ({"max_epochs": 9, "min_steps": 3, "accumulate_grad_batches": 2}, 2, "6 v"),
        # a maximum beats a minimum
        ({"max_epochs": 1, "min_epochs": 5}, 6, "10 v |"),
        ({"max_steps": 7, "min_steps": 50}, 2, "7"),
        ({"max_epochs": 1, "min_steps": 50}, 2, "10 v |"),
    ],
)
def test_early_stop(options, stop_at_batch, expected, chunk):
    assert walk(build_settings(**options), 10, chunk, stop_at_batch) == expected


@pytest.mark.parametrize(
    ("limit", "length", "batches"),
    [
        (1.0, 10, 10),
        (1, 10, 1),
        (3, 10, 3),
        (30, 10, 10),
        (0, 10, 0),
        (0.0, 10, 0),
        (0.5, 5, 2),
        (0.29, 100, 29),
        (0.999, 10, 9),
        (1.0, 0, 0),
        (0.5, 0, 0),
        (1.0, None, None),
        (4, None, 4),
        (0, None, 0),
        (0.0, None, 0),
    ],
)
def test_limits(limit, length, batches):
    assert schedule.resolve_limit("limit_train_batches", limit, length) == batches


def test_fraction_that_rounds_to_nothing_names_the_length():
    with pytest.raises(ConfigurationError, match=r"limit_val_batches=0\.05 .*10 batches.*at least 0\.1"):
        schedule.resolve_limit("limit_val_batches", 0.05, 10)


def test_fraction_of_an_unknown_length():
    with pytest.raises(ConfigurationError, match=r"limit_train_batches=0\.5: .*no length.*number of batches"):
        schedule.resolve_limit("limit_train_batches", 0.5, None)
    with pytest.raises(ConfigurationError, match=r"val_check_interval=0\.5: .*no length.*number of batches or 1\.0"):
        schedule.resolve_val_every(build_settings(val_check_interval=0.5), None)


def test_interval_longer_than_an_epoch_names_both_numbers():
    with pytest.raises(
        ConfigurationError, match=r"val_check_interval=12 .*10 training batches.*check_val_every_n_epoch=None"
    ):
        schedule.resolve_val_every(build_settings(val_check_interval=12), 10)
    assert schedule.resolve_val_every(build_settings(val_check_interval=12, check_val_every_n_epoch=None), 10) == 12


@pytest.mark.parametrize(("seconds", "done"), [(9.9, False), (10.0, True), (11.0, True)])
def test_max_time(seconds, done):
    settings = build_settings(max_time={"seconds": 10})
    assert schedule.is_done(settings, Progress(seconds=seconds), False) is done
    # a maximum beats a minimum
    assert schedule.is_done(replace(settings, min_steps=5, min_epochs=7), Progress(seconds=seconds), False) is done


def test_next_epoch_moves_the_cursor_only():
    progress = Progress(epoch=2, batch=10, total_batches=30, step=15, seconds=1.5, epoch_ended=True, validated_at=30)
    assert progress.completed == 3
    progress.next_epoch()
    assert progress == Progress(epoch=3, total_batches=30, step=15, seconds=1.5, validated_at=30)
    assert progress.completed == 3


@pytest.mark.parametrize(
    ("step", "max_steps", "min_steps", "every", "expected"),
    [
        (0, None, None, (), None),
        (3, 10, None, (), 10),
        (3, 10, 5, (), 5),
        (5, 10, 5, (), 10),
        (3, None, None, (4, 10), 4),
        (4, None, None, (4, 10), 8),
        (8, 9, None, (4, 10), 9),
    ],
)
def test_next_step_stop(step, max_steps, min_steps, every, expected):
    settings = build_settings(max_steps=max_steps, min_steps=min_steps)
    assert schedule.next_step_stop(settings, Progress(step=step), every) == expected


@pytest.mark.parametrize(
    ("previous", "seconds", "expected"),
    [
        (0, 0.0, 1),  # nothing measured yet
        (1, 10.0, 1),  # slow batches: one at a time
        (1, 0.0, 16),  # no time measured: grow
        (1, 0.5, 2),
        (1, 0.001, 16),  # grows sixteenfold at most, since first batches say little
        (16, 0.016, 256),
        (1000, 1.0, 1000),
        (1000, 2.0, 500),
    ],
)
def test_chunks_of_about_a_second(previous, seconds, expected):
    assert schedule.chunk_batches(previous, seconds) == expected


def test_another_number_of_workers_takes_an_epoch_up() -> None:
    progress = schedule.Progress(epoch=1, batch=6)
    schedule.rescale(progress, (2, 4), (2, 4))
    assert (progress.batch, progress.before) == (6, ())
    schedule.rescale(progress, (2, 4), (3, 4))
    assert (progress.batch, progress.before) == (0, ((2, 6, 4),))
    progress.batch = 2
    schedule.rescale(progress, (3, 4), (1, 4))
    assert (progress.batch, progress.before) == (0, ((2, 6, 4), (3, 2, 4)))
    assert progress.shift == 18
    schedule.rescale(progress, (1, 4), (4, 2))  # before a batch was done
    assert (progress.before, progress.shift) == (((2, 6, 4), (3, 2, 4)), 9)
    progress.next_epoch()
    assert (progress.before, progress.shift) == ((), 0)


@pytest.mark.parametrize(
    ("before", "now", "divisible", "expected"),
    [
        ((2, 4), (2, 8), True, (0, ((2, 6, 4),), 3)),
        ((2, 4), (2, 8), False, (6, (), 0)),  # a stream goes on from its state
        ((2, 0), (2, 8), True, (6, (), 0)),
        ((2, 8), (2, 0), True, (6, (), 0)),
        ((2, 0), (4, 8), True, (0, ((2, 6, 0),), 3)),
        ((2, 8), (4, 4), False, (0, ((2, 6, 8),), 6)),
    ],
)
def test_another_batch_size_takes_an_epoch_up(before, now, divisible, expected) -> None:
    progress = schedule.Progress(batch=6)
    schedule.rescale(progress, before, now, divisible)
    assert (progress.batch, progress.before, progress.shift) == expected


def test_what_is_counted_in() -> None:
    assert schedule.counted_in({"parts": 2, "world_size": 4, "batch_size": 8}, 1) == (2, 8)
    assert schedule.counted_in({"world_size": 4, "batch_size": None}, 1) == (4, 0)
    assert schedule.counted_in({}, 3) == (3, 0)
    assert schedule.samples_before([(2, 6, 4), (3, 2, 0), (1, 1)], 8) == 48 + 48 + 8


def test_an_epoch_that_has_ended_is_not_dealt_out_anew() -> None:
    """Its validation is still to come, and counts its batches."""
    progress = schedule.Progress(batch=6, total_batches=6, epoch_ended=True)
    schedule.rescale(progress, (2, 4), (3, 4))
    assert (progress.batch, progress.before) == (6, ())
    assert schedule.validation_due(build_settings(), progress, None, at_epoch_end=True)


def test_what_is_left_of_an_epoch_is_no_epoch() -> None:
    """An interval that fits the epoch is no error when less is left of it; a fraction is of the whole."""
    assert schedule.resolve_val_every(build_settings(val_check_interval=5), 3, shift=7) == 5
    assert schedule.resolve_val_every(build_settings(val_check_interval=0.5), 4, shift=6) == 5
    with pytest.raises(ConfigurationError):
        schedule.resolve_val_every(build_settings(val_check_interval=5), 3)


def test_validation_of_an_epoch_that_others_have_done() -> None:
    ended = schedule.Progress(before=((2, 5),), total_batches=5, epoch_ended=True)
    assert schedule.validation_due(build_settings(), ended, None, at_epoch_end=True)
    taken_up = schedule.Progress(before=((2, 5),), total_batches=5)
    assert not schedule.validation_due(build_settings(), taken_up, None, at_epoch_end=False)
    interval = build_settings(val_check_interval=4)
    assert not schedule.validation_due(interval, taken_up, 4, at_epoch_end=False)
    # 6 batches of this group's would have done what others have: the next validation is after 8
    taken_up.shift = 6
    assert schedule.batches_until_decision(interval, taken_up, 10, 4, most=100) == 2
    taken_up.batch, taken_up.total_batches = 2, 7
    assert schedule.validation_due(interval, taken_up, 4, at_epoch_end=False)
