"""Waiting for what Ray has been asked, in pieces, so that Ctrl-C is heard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from raytrainer.signals import wait_until

__all__ = ["wait_for"]


def wait_for(refs: Sequence[Any], seconds: float) -> None:
    """Wait at most so long until all of these have come; the caller looks which have."""
    asked = list(refs)
    if asked:
        wait_until(lambda piece: not ray.wait(asked, num_returns=len(asked), timeout=piece)[1], seconds)
