"""Ctrl-C is this process's, not its loaders'; and these end with it."""

from __future__ import annotations

import os
import select
import signal
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from raytrainer.data.loader_processes import control_c_left_alone, garbage_left_alone


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
