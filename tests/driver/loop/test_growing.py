"""Runs that try for more workers."""

from __future__ import annotations

import pytest
from exact import Exact, Mortal, run, same

from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.errors import WorkerLostError


@pytest.fixture
def calm(tmp_path):
    module = Exact()
    run(module, tmp_path)
    return module


@pytest.mark.parametrize("fails", [False, True], ids=["got", "lost"])
def test_nothing_is_lost_with_workers_that_were_to_be_added(fails, calm, monkeypatch, tmp_path):
    """A new worker may die at its start: that is a failure like any other."""
    asked = []

    def take(self, settings):
        asked.append(settings)
        if fails and len(asked) == 2:
            raise WorkerLostError(1, "the new node is no good")
        return Mortal()

    monkeypatch.setattr(GroupSupply, "take", take)
    monkeypatch.setattr(GroupSupply, "can_grow", lambda self, settings, group: len(asked) == 1)
    module = Exact()
    trainer, _ = run(module, tmp_path, snapshot_every=4)
    assert same(module, calm)
    assert len(asked) == 2 + fails
    assert [r.replayed_batches for r in trainer.recoveries] == [0] * fails


def test_an_attempt_that_gains_nothing_is_not_repeated_at_once(calm, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: asked.append(settings) or Mortal())
    monkeypatch.setattr(GroupSupply, "can_grow", lambda self, settings, group: True)
    module = Exact()
    run(module, tmp_path)
    assert same(module, calm)
    assert len(asked) == 3  # at the start, and before the second and third epoch
