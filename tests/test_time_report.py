"""Where a fit's time went."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import pytest
from tiny import Tiny, data

from raytrainer import ModelCheckpoint
from raytrainer.driver.loop.coordinator import Coordinator
from raytrainer.driver.loop.interrupt import Interrupt
from raytrainer.driver.workers.local_group import LocalGroup
from raytrainer.plan import phase_clock as timing
from raytrainer.plan.settings import build_settings
from raytrainer.task import Task
from raytrainer.view.run_state import RunState


class Slow(Tiny):
    """Spends time in one place: what is done there is not the point."""

    def __init__(self, where, sleep):
        super().__init__()
        self.where, self.sleep = where, sleep

    def spend(self, where):
        if where == self.where:
            self.sleep(0.03)

    def setup(self, stage):
        self.spend("starting")

    def on_train_batch_start(self, batch, batch_idx):
        self.spend("computing")

    def validation_step(self, batch, batch_idx):
        self.spend("validating")

    def on_save_checkpoint(self, checkpoint):
        self.spend("saving")

    def on_train_epoch_end(self):
        self.spend("other")


@pytest.fixture
def sleep(monkeypatch):
    """Nothing takes time but this, as saving on a busy machine may take longer than all that is slow here."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


@pytest.mark.parametrize("where", ["starting", "data", "computing", "validating", "saving", "other"])
def test_it_shows_where_time_is_spent(where, sleep, local_trainer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(timing, "_LEAST_SECONDS", 0.0)
    root = logging.getLogger("raytrainer")
    root.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "raytrainer")

    class Batches:
        def __iter__(self):
            for batch in data(6):
                sleep(0.03 if where == "data" else 0.0)
                yield batch

    trainer = local_trainer(max_epochs=1, callbacks=ModelCheckpoint(tmp_path, every_n_train_steps=1))
    assert trainer.time_report is None
    try:
        began = time.perf_counter()
        trainer.fit(Slow(where, sleep), Batches(), data(4))
        took = time.perf_counter() - began
    finally:
        root.removeHandler(caplog.handler)
    report = trainer.time_report
    assert 0.03 <= getattr(report, where) <= report.total <= took
    assert sum(report.shares.values()) == pytest.approx(1.0)
    if where != "starting":  # the first run in a process starts slowly
        expected = {"other": 0.03, "validating": 0.12}.get(where, 0.09)
        assert getattr(report, where) >= expected
    assert f"fit took {report}" in caplog.text
    assert ("raise num_workers" in caplog.text) == (report.hint is not None)
    if where == "data":
        assert report.hint is not None
    if where == "computing":
        assert report.hint is None


def test_a_fit_that_fails_has_one_and_an_evaluation_has_none(local_trainer):
    class Failing(Tiny):
        def on_train_epoch_end(self):
            raise LookupError

    trainer = local_trainer(max_epochs=1)
    with pytest.raises(LookupError):
        trainer.fit(Failing(), data(6))
    assert trainer.time_report.computing > 0
    trainer.validate(Tiny(), data(4), verbose=False)
    assert trainer.time_report is None


@pytest.mark.parametrize("datasets", [{}, {"val": ["blocks"]}, {"train": ["blocks"]}])
def test_it_knows_what_training_reads(datasets):
    task = Task("fit", Tiny(), None, build_settings(strategy="local"), [], datasets=datasets)
    state, host = RunState(), SimpleNamespace(callback_states=dict)
    Coordinator(task, LocalGroup(), state, host, Interrupt())
    assert state.clock.report().ray_data == ("train" in datasets)
