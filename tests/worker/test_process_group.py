"""What a worker's process group leaves behind."""

from __future__ import annotations

import sys

import torch.distributed as dist

import raytrainer.worker.process_group  # noqa: F401


def test_nothing_has_the_group_for_a_default():
    """torch's functions that have would keep its sockets open after it was left, and who waits for them waiting."""
    functional = sys.modules["torch.distributed.nn.functional"]
    defaults = [each for one in vars(functional).values() for each in getattr(one, "__defaults__", None) or ()]
    assert None in defaults and not any(isinstance(each, dist.ProcessGroup) for each in defaults)
