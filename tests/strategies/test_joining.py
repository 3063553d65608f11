"""Counting workers without a gradient, and what tells that a backward pass has come to a parameter."""

from __future__ import annotations

import gc
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from raytrainer.strategies.joining import Absentees, Reached


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_absentees_are_counted_by_window(alone):
    store = dist.HashStore()
    one = Absentees(store, alone, world_size=2)
    one.count()
    assert one.counted
    assert not one.are_all()
    store.add(f"{one._name}/0", 1)  # the other worker
    assert one.are_all()
    one.next_window()
    assert not one.counted
    assert not one.are_all()


def test_the_store_keeps_no_count_that_all_have_seen(alone):
    store = dist.HashStore()
    one = Absentees(store, alone, world_size=1)
    for _ in range(20):
        one.count()
        assert one.are_all()
        one.next_window()
    assert store.num_keys() <= 4


def test_reached_by_a_backward_pass():
    part, other = nn.Linear(2, 1), nn.Linear(2, 1)
    reached = Reached(part.weight)
    other(torch.ones(2)).backward()
    assert not reached.seen
    part(torch.ones(2)).backward()
    assert reached.seen
    reached.seen.clear()
    other(torch.ones(2)).backward()
    assert not reached.seen
    part(torch.ones(2)).backward()
    reached.close()
    assert not reached.seen
    part(torch.ones(2)).backward()
    assert not reached.seen


def test_a_parameter_is_freed_once_nobody_asks_whether_it_was_reached():
    part = nn.Linear(2, 1)
    reached, gone = Reached(part.weight), weakref.ref(part.weight)
    part(torch.ones(2)).backward()
    assert reached.seen
    del part, reached
    gc.collect()
    assert gone() is None
