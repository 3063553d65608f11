"""SIGUSR1 to a run in this process says where it is, also while something holds Python's lock; the run goes on."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from pathlib import Path

import pytest
from tiny import Tiny, data

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")


class Told(logging.Handler):
    """Knows when the answer has come."""

    def __init__(self) -> None:
        super().__init__()
        self.came, self.text = threading.Event(), ""

    def emit(self, record: logging.LogRecord) -> None:
        if "Asked where" in record.getMessage():
            self.text = record.getMessage()
            self.came.set()


@pytest.fixture
def told():
    handler = Told()
    logging.getLogger("raytrainer").addHandler(handler)
    yield handler
    logging.getLogger("raytrainer").removeHandler(handler)


def line_of(mark: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# {mark}"))


def test_the_users_line_is_told(local_trainer, told):
    class Waits(Tiny):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGUSR1), told.came.wait(60)  # waits here
            return super().training_step(batch, batch_idx)

    trainer = local_trainer(max_epochs=1)
    trainer.fit(Waits(), data())
    assert trainer.global_step == 10
    assert f"rank 0 on {os.uname().nodename}, pid {os.getpid()}: at {__file__}:{line_of('waits here')}" in told.text
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_while_pythons_lock_is_held(local_trainer, told, monkeypatch, tmp_path):
    written = (tmp_path / "stderr").open("w+")
    monkeypatch.setattr("sys.__stderr__", written)

    class Holds(Tiny):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                getattr(ctypes.PyDLL(None), "raise")(signal.SIGUSR1)  # holds it
                # C code has answered; Python's handler runs from here on
                written.seek(0)
                assert f'{__file__}", line {line_of("holds it")} in training_step' in written.read()
            return super().training_step(batch, batch_idx)

    local_trainer(max_epochs=1).fit(Holds(), data())
    assert told.came.wait(60)


def test_a_handler_of_the_programs_own_stays(local_trainer, told):
    seen = []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:

        class Asks(Tiny):
            def on_train_start(self):
                os.kill(os.getpid(), signal.SIGUSR1)

        local_trainer(max_epochs=1).fit(Asks(), data())
        assert seen == [1] and not told.came.is_set()
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_where_there_are_no_workers(told):
    from raytrainer.driver.loop.asked_where import AskedWhere

    with AskedWhere(lambda: None, in_process=False):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert told.came.wait(60) and "no workers" in told.text
