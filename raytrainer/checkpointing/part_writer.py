"""What a node's process does to write the files of its workers: without torch, so that it starts within a moment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from threading import Event
from typing import Any

from raytrainer.checkpointing.checkpoint_files import CheckpointFolder
from raytrainer.checkpointing.part_file import PartPlan, PartRecord, write_part
from raytrainer.checkpointing.places import folder_at
from raytrainer.errors import CheckpointError

__all__ = ["write_parts"]


def write_parts(
    path: str,
    shown: str,
    marker: str,
    environment: Mapping[str, str | None],
    plans: Sequence[PartPlan],
    *pieces: Mapping[str, Any],
) -> list[PartRecord | CheckpointError] | None:
    """Write several files at once.

    Args:
        path: Of the checkpoint; absolute, or a URI.
        shown: What messages call it.
        marker: A file that is there while the save is under way.
        environment: Variables to set meanwhile, such as keys of a storage service; None: to remove.
        plans: What each file is to have.
        pieces: For each file the bytes of its pieces, by their keys.

    Returns:
        For each what was written, or why it was not. None: what is at `path` here is another folder, or none.
    """
    with _environment(environment):
        try:
            folder = replace(folder_at(path), shown=shown)
            folder.storage.read(folder.inside(marker))
        except OSError:
            return None
        return _write(folder, plans, pieces)


def _write(
    folder: CheckpointFolder, plans: Sequence[PartPlan], pieces: Sequence[Mapping[str, Any]]
) -> list[PartRecord | CheckpointError]:
    stop = Event()

    def write(plan: PartPlan, data: Mapping[str, Any]) -> PartRecord | CheckpointError:
        try:
            return write_part(folder, plan, data, stop.is_set)
        except CheckpointError as error:
            stop.set()  # without this one there will be no checkpoint
            return error

    pool = ThreadPoolExecutor(max(1, len(plans)))
    try:
        return list(pool.map(write, plans, pieces))
    finally:
        stop.set()  # also where it is called off
        pool.shutdown()


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """This process is Ray's, and does other work later."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
