"""Workers that hang say where: the right rank, the user's line, and what the others wait for."""

from __future__ import annotations

import ctypes
import inspect
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from ray_models import eventually

import raytrainer
from raytrainer.errors import WorkerLostError

#: What rank 1 does in each of its batches, and what it then waits for.
HANGS = {
    "loops": "", "locks": "", "waits_for_a_thread": "another thread", "holds_pythons_lock": "",
    "skips_a_collective": "another thread", "sleeps_for_ever": "",
}  # fmt: skip


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
        if self.file.name == "skips_a_collective":
            torch.distributed.all_reduce(torch.ones(1))
        return self.net(batch).sum()

    def let_go(self, action):
        """Calls `action` once the file is there."""

        def waiting():
            while not self.file.exists():
                time.sleep(0.05)
            action()

        thread = threading.Thread(target=waiting)
        thread.start()
        return thread

    def loops(self):
        while not self.file.exists():
            sum(range(100_000))  # loops

    def locks(self):
        lock = threading.Lock()
        lock.acquire()
        self.let_go(lock.release)
        lock.acquire()  # locks

    def waits_for_a_thread(self):
        self.let_go(print).join()  # waits_for_a_thread

    def holds_pythons_lock(self):
        while not self.file.exists():
            ctypes.PyDLL(None).sleep(2)  # holds_pythons_lock

    def skips_a_collective(self):
        self.let_go(print).join()  # skips_a_collective

    def sleeps_for_ever(self):
        threading.Event().wait()  # sleeps_for_ever

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def line_of(mark: str) -> int:
    source, first = inspect.getsourcelines(Hanging)
    return first + next(i for i, line in enumerate(source) if line.endswith(f"# {mark}\n"))


def test_each_hang_is_found(ray_trainer, tmp_path, caplog):
    """Asked while it hangs, from another thread and by a signal; and told when `hang_timeout` is over."""
    trainer = ray_trainer(max_epochs=1, max_failures=0)
    found: dict[str, list[object]] = {}

    def look():
        for how in list(HANGS)[:-1]:
            seen: list[object] = []

            def hangs(how=how, seen=seen):
                seen[:] = trainer.where()
                lines = [where.user.line if where.user is not None else None for where in seen]
                return len(lines) == 2 and lines[1] == line_of(how) and seen[0].waits_for != ""

            try:
                eventually(hangs, 90, how)
                if how == "loops":
                    os.kill(os.getpid(), signal.SIGUSR1)
                    eventually(lambda: f":{line_of('loops')} in loops" in caplog.text, 60, "the signal's answer")
            finally:
                found[how] = seen
                (tmp_path / how).touch()

    asking = threading.Thread(target=look)
    asking.start()
    trainer.fit(Hanging(tmp_path), [torch.ones(2, 4)] * (len(HANGS) - 1))
    asking.join()
    for how, (other, stuck) in found.items():
        assert (stuck.rank, stuck.user.line, stuck.waits_for) == (1, line_of(how), HANGS[how]), f"{how}: {stuck}"
        waits = "the collective all_reduce" if how == "skips_a_collective" else "the backward pass"
        assert waits in other.waits_for, f"{how}: {other}"
    assert trainer.where() == []
    with pytest.raises(WorkerLostError, match="no answer from rank") as caught:  # what came before does not wait again
        ray_trainer(max_epochs=1, max_failures=0, hang_timeout=5.0).fit(
            Hanging(tmp_path), [torch.ones(2, 4)] * len(HANGS)
        )
    assert f"test_ray_whereabouts.py:{line_of('sleeps_for_ever')} in sleeps_for_ever" in str(caught.value)
    assert "rank 0 on" in str(caught.value)
