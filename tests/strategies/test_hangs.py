"""Ways to hang, on one of two workers: `trainer.where()` names the rank and its line, and what the other waits for."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader

import raytrainer
from raytrainer.plan.where_it_is import keep_waiting

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
THREAD, LOADER = "another thread", "a batch from the loader's processes, in one of which this line is"

#: What rank 1 does in one of its batches, and what it then waits for.
IN_STEPS = {
    "loops": "",
    "locks": "",
    "waits_for_a_thread": THREAD,
    "holds_pythons_lock": "",
    "skips_a_collective": THREAD,
    "calls_a_collective_more": "the collective all_reduce",
    "waits_for_a_program": "another program",
    "waits_for_a_queue": "a queue",
    "waits_for_a_dead_link": "",
    "has_a_hook_that_does_not_return": "",
}
#: What rank 0 waits for meanwhile, where it is not the backward pass.
OTHERS = {"skips_a_collective": "the collective all_reduce", "setup": "the driver", "validation": "the driver"}


class Hanging(raytrainer.Module):
    """Rank 1 does not go on before a file is there."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.net = torch.nn.Linear(4, 1)

    def setup(self, stage):
        self.aside = distributed.new_group()
        self.hang_in("setup")

    def hang_in(self, name):
        self.file = self.folder / name
        if self.global_rank == 1:
            self.loops()

    def training_step(self, batch, batch_idx):
        self.file, self.loss = self.folder / list(IN_STEPS)[batch_idx], self.net(batch).sum()
        if self.global_rank == 1:
            getattr(self, self.file.name)()
        elif self.file.name == "skips_a_collective":
            distributed.all_reduce(torch.ones(1))
        elif self.file.name == "calls_a_collective_more":
            self.let_go(lambda: distributed.all_reduce(torch.ones(1), group=self.aside))
        return self.loss

    def validation_step(self, batch, batch_idx):
        self.hang_in("validation")

    def let_go(self, action):
        """Calls `action` once the file is there."""

        def waiting():
            while not self.file.exists():
                time.sleep(0.02)
            action()

        thread = threading.Thread(target=waiting)
        thread.start()
        return thread

    def loops(self):
        while not self.file.exists():
            sum(range(10_000))  # loops, setup, validation

    def locks(self):
        lock = threading.Lock()
        lock.acquire()
        self.let_go(lock.release)
        lock.acquire()  # locks

    def waits_for_a_thread(self):
        self.let_go(print).join()  # waits_for_a_thread

    def holds_pythons_lock(self):
        while not self.file.exists():
            ctypes.PyDLL(None).usleep(500_000)  # holds_pythons_lock

    def skips_a_collective(self):
        self.let_go(lambda: distributed.all_reduce(torch.ones(1))).join()  # skips_a_collective

    def calls_a_collective_more(self):
        distributed.all_reduce(torch.ones(1), group=self.aside)  # calls_a_collective_more

    def waits_for_a_program(self):
        command = ["sh", "-c", 'until [ -e "$0" ]; do sleep 0.05; done', str(self.file)]
        subprocess.run(command, check=True)  # waits_for_a_program

    def waits_for_a_queue(self):
        full: queue.Queue[None] = queue.Queue()
        self.let_go(lambda: full.put(None))
        full.get()  # waits_for_a_queue

    def waits_for_a_dead_link(self):
        here, there = socket.socketpair()
        self.let_go(there.close)
        here.recv(1)  # waits_for_a_dead_link

    def has_a_hook_that_does_not_return(self):
        def hook(gradient):
            while not self.file.exists():
                time.sleep(0.02)  # has_a_hook_that_does_not_return

        self.loss.register_hook(hook)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Stuck(torch.utils.data.Dataset):
    """The last sample of rank 1 is not to be had before a file is there."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __len__(self):
        return 2

    def __getitem__(self, index):
        while index and not self.file.exists():
            time.sleep(0.02)  # loader, loaders_process
        return torch.ones(4)


def line_of(name: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if name in line.partition("  # ")[2].split(", "))


class Looking:
    """Asks where the run is, from another thread, until rank 1 is seen to hang as it should; then lets it go.

    Args:
        waits: What rank 1 is to wait for, by name; "" for others. It may be seen on its line before it waits there.
    """

    def __init__(self, trainer, folder: Path, names, waits) -> None:
        self.trainer, self.folder, self.found, self.names, self.waits = trainer, folder, {}, names, waits
        self.thread = threading.Thread(target=self._look)

    def __enter__(self):
        self.thread.start()
        return self.found

    def __exit__(self, *_):
        self.thread.join()

    def _look(self):
        for name in self.names:
            until = time.monotonic() + 90.0
            while time.monotonic() < until:
                self.found[name] = seen = self.trainer.where()
                lines = [where.user.line if where.user is not None else None for where in seen]
                if lines[1:] != [line_of(name)] or seen[1].waits_for != self.waits.get(name, ""):
                    continue
                if OTHERS.get(name, "the backward pass") in seen[0].waits_for:
                    break
            (self.folder / name).touch()


def test_where_each_hangs(forked, tmp_path):
    names = ["setup", "validation", *IN_STEPS]
    trainer = forked(max_epochs=1, strategy="ddp_cpu", limit_val_batches=1, num_sanity_val_steps=1)
    with Looking(trainer, tmp_path, names, IN_STEPS) as found:
        trainer.fit(Hanging(tmp_path), [torch.ones(2, 4)] * len(IN_STEPS), [torch.ones(2, 4)] * 2)
    for name, (other, hangs) in found.items():
        assert (hangs.rank, hangs.user.line, hangs.waits_for) == (1, line_of(name), IN_STEPS.get(name, "")), hangs
        assert OTHERS.get(name, "the backward pass") in other.waits_for, f"{name}: {other}"
    assert len(found) == len(names) and trainer.where() == []


@pytest.mark.parametrize(("name", "workers", "waits"), [("loader", 0, ""), ("loaders_process", 1, LOADER)])
def test_where_a_loader_hangs(forked, tmp_path, name, workers, waits):
    trainer = forked(max_epochs=1, strategy="ddp_cpu")
    module = Hanging(tmp_path)
    module.setup, module.training_step = lambda stage: None, lambda batch, batch_idx: module.net(batch).sum()
    with Looking(trainer, tmp_path, [name], {name: waits}) as found:
        trainer.fit(module, DataLoader(Stuck(tmp_path / name), num_workers=workers))
    other, hangs = found[name]
    assert (hangs.rank, hangs.user.line, hangs.waits_for) == (1, line_of(name), waits), hangs
    assert "the backward pass" in other.waits_for


def test_a_process_that_is_stopped_does_not_answer(forked, forked_groups):
    class Stops(Hanging):
        def setup(self, stage):
            pass

        def training_step(self, batch, batch_idx):
            if self.global_rank == 1 and batch_idx == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            return self.net(batch).sum()

    stopped = forked_groups.take(2).pids[1]
    found = []

    def look():
        while Path(f"/proc/{stopped}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.02)
        until = time.monotonic() + 60
        while keep_waiting(found) != [1] and time.monotonic() < until:  # the other may not wait yet
            found[:] = forked_groups.take(2).whereabouts(1.0)
        os.kill(stopped, signal.SIGCONT)

    looking = threading.Thread(target=look)
    looking.start()
    forked(max_epochs=1, strategy="ddp_cpu").fit(Stops(Path()), [torch.ones(2, 4)] * 2)
    looking.join()
    assert found[1].where == "did not answer" and keep_waiting(found) == [1]
