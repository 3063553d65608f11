"""Actors' bodies that form groups, in processes of their own without Ray."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from raytrainer.plan.ranks import Ranks
from raytrainer.worker.actor import actor

FORK = multiprocessing.get_context("fork")
HOST = "127.0.0.1"


def _join_twice(first: int, ports: Any, answers: Any, folder: str) -> None:
    actor.log_folder = lambda: Path(folder)  # type: ignore[assignment]
    worker = actor.RemoteWorker()
    for turn, rank in enumerate((first, 1 - first)):
        if rank == 0:
            port = worker.serve(HOST, 2)
            ports[turn].put(port)
        else:
            port = ports[turn].get()
        failure = worker.join(Ranks(rank, 2, rank, 2, 0, 1), HOST, port, HOST, False)
        answers.put((turn, rank, failure or dist.get_rank()))
    answers.close()
    answers.join_thread()
    os._exit(0)


def test_a_worker_that_was_rank_0_joins_as_another(tmp_path):
    """As survivors do where a node takes another one's place that comes first in the order of nodes."""
    ports, answers = [FORK.Queue(), FORK.Queue()], FORK.Queue()
    processes = [FORK.Process(target=_join_twice, args=(first, ports, answers, str(tmp_path))) for first in (0, 1)]
    for process in processes:
        process.start()
    try:
        found = sorted(answers.get(timeout=60) for _ in range(4))
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert found == [(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)]
