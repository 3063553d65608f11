"""Ctrl-C is this process's, not its loaders'; and these end with it."""

from __future__ import annotations

import fcntl
import os
import resource
import select
import signal
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from raytrainer.data.loader_processes import control_c_left_alone, garbage_left_alone, sure_fork


class Blocked(Dataset[Any]):
    """Whether Ctrl-C is kept from the process that reads."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> bool:
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("how", ["fork", "spawn"])  # forkserver's processes are forks of what is spawned
def test_a_terminals_control_c_is_not_heard_there(how: str) -> None:
    loader = DataLoader(Blocked(), num_workers=1, multiprocessing_context=how)
    with control_c_left_alone(loader):
        iterator = iter(loader)
    assert bool(next(iterator))
    iterator._shutdown_workers()
    assert not Blocked()[0]


def test_it_comes_here_when_they_have_been_started() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), control_c_left_alone(None):
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert reached


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the system has no pidfd")
def test_they_end_with_their_parent() -> None:
    """They hold copies of its connections, which tell others that it is gone only when all are closed."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        with garbage_left_alone():
            os.fork()
        os.write(writing, b".")
        while True:
            signal.pause()
    os.close(writing)
    assert os.read(reading, 1) == b"." and os.read(reading, 1) == b"."  # both run
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert select.select([reading], [], [], 60.0)[0]
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_one_that_does_not_begin_is_replaced() -> None:
    """On CPython before 3.11.10 it may wait, within `os.fork()`, for a thread that a fork has not."""
    stuck = []

    def fork() -> int:
        child = os.fork()
        if child == 0 and not stuck:
            while True:
                signal.pause()
        stuck.append(child)
        return child

    child = sure_fork(fork, 0.5)
    if child == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert child != stuck[0] and child == stuck[-1]
    with pytest.raises(ChildProcessError):
        os.waitpid(stuck[0], os.WNOHANG)  # it is gone


def test_a_process_with_many_open_files_may_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """`select` knows 1,024."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= 1500:
        pytest.skip("so many files may not be open here")
    pipe = os.pipe

    def high() -> tuple[int, int]:
        low = pipe()
        reading, writing = (fcntl.fcntl(end, fcntl.F_DUPFD, 1400) for end in low)
        for end in low:
            os.close(end)
        return reading, writing

    monkeypatch.setattr(os, "pipe", high)
    child = sure_fork(os.fork)
    if child == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_loaders_processes_are_among_these(monkeypatch: pytest.MonkeyPatch) -> None:
    before, forks = os.fork, []
    monkeypatch.setattr("raytrainer.data.loader_processes._MAY_NOT_BEGIN", True)
    monkeypatch.setattr("raytrainer.data.loader_processes.sure_fork", lambda fork: forks.append(fork) or fork())
    with garbage_left_alone():
        with garbage_left_alone():
            iterator = iter(DataLoader(Blocked(), num_workers=2, multiprocessing_context="fork"))
        assert os.fork is not before
    iterator._shutdown_workers()
    assert forks == [before, before] and os.fork is before
