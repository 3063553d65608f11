"""Workers that hang say where, asked over Ray, by a signal, and when it is over; more ways to hang: `test_hangs`."""

from __future__ import annotations

import ctypes
import inspect
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from ray_models import FastForward, eventually

import raytrainer
from raytrainer.driver.workers import ray_answers, standstill_watch
from raytrainer.errors import DisagreementError, WorkerLostError

#: What rank 1 does in each of its batches, and what it then waits for.
HANGS = {"loops": "", "holds_pythons_lock": "", "sleeps_for_ever": "another thread"}


class Hanging(raytrainer.Module):
    """Rank 1 does not go on before a file is there."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        self.file = self.folder / list(HANGS)[batch_idx]
        if self.global_rank == 1:
            getattr(self, self.file.name)()
        return self.net(batch).sum()

    def loops(self):
        while not self.file.exists():
            sum(range(100_000))  # loops

    def holds_pythons_lock(self):
        while not self.file.exists():
            ctypes.PyDLL(None).sleep(2)  # holds_pythons_lock

    def sleeps_for_ever(self):
        threading.Event().wait()  # sleeps_for_ever

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def line_of(mark: str) -> int:
    source, first = inspect.getsourcelines(Hanging)
    return first + next(i for i, line in enumerate(source) if line.endswith(f"# {mark}\n"))


@pytest.mark.late(2.1)  # with two that nobody wants afterwards
def test_each_hang_is_found(ray_trainer, tmp_path, caplog, monkeypatch):
    """Asked while it hangs, from another thread and by a signal; and told when `hang_timeout` is over."""
    trainer = ray_trainer(max_epochs=1, max_failures=0)
    found: dict[str, list[object]] = {}
    monkeypatch.setattr(ray_answers, "time", clock := FastForward())

    def look():
        for how in HANGS:
            seen: list[object] = []

            def hangs(how=how, seen=seen):
                seen[:] = trainer.where()
                lines = [where.user.line if where.user is not None else None for where in seen]
                if lines[1:] != [line_of(how)] or seen[1].waits_for != HANGS[how]:
                    return False
                # they are asked one after the other: the first may not have had the verb yet, and wait for the driver
                return "the backward pass" in seen[0].waits_for

            try:
                eventually(hangs, how)
                if how == "loops":
                    os.kill(os.getpid(), signal.SIGUSR1)
                    eventually(lambda: f":{line_of('loops')} in loops" in caplog.text, "the signal's answer")
            finally:
                found[how] = seen
                if how == "sleeps_for_ever":
                    clock.added += trainer.hang_timeout
                else:
                    (tmp_path / how).touch()

    asking = threading.Thread(target=look)
    asking.start()
    with pytest.raises(WorkerLostError, match="no answer from rank") as caught:
        trainer.fit(Hanging(tmp_path), [torch.ones(2, 4)] * len(HANGS))
    asking.join()
    for how, (other, stuck) in found.items():
        assert (stuck.rank, stuck.user.line, stuck.waits_for) == (1, line_of(how), HANGS[how]), f"{how}: {stuck}"
        assert stuck.seconds >= 0
        assert "the backward pass" in other.waits_for, f"{how}: {other}"
    assert trainer.where() == []
    assert f"test_ray_whereabouts.py:{line_of('sleeps_for_ever')} in sleeps_for_ever" in str(caught.value)
    assert "rank 0 on" in str(caught.value)


class Alone(raytrainer.Module):
    """Rank 1 gathers alone, once."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and batch_idx == 2:
            self.all_gather(torch.ones(3))
        return self.net(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_workers_that_wait_for_each_other(ray_trainer, monkeypatch):
    monkeypatch.setattr(standstill_watch, "_FIRST", 1.0)
    monkeypatch.setattr(standstill_watch, "_EVERY", 1.0)
    trainer = ray_trainer(max_epochs=1, max_failures=3)
    said = r"rank 1: in batch 2, at .*training_step, waiting for the collective all_gather"
    with pytest.raises(DisagreementError, match=said):
        trainer.fit(Alone(), [torch.ones(2, 4)] * 4)
    assert trainer.recoveries == []
