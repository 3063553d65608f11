"""Bytes of main memory that processes share: by memory segments, and in Ray's store."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def _files() -> dict[tuple[int, int], tuple[str, int]]:
    """By device and number: name and bytes of what this process's Ray shares."""
    found: dict[tuple[int, int], tuple[str, int]] = {}
    for pid in family():
        with contextlib.suppress(OSError):  # it has ended
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    name = os.readlink(entry)
                    if name.startswith(("/memfd:raytrainer-", "/dev/shm/plasma")):
                        status = entry.stat()
                        found[status.st_dev, status.st_ino] = name, 512 * status.st_blocks
    return found


def shared_bytes() -> tuple[int, int]:
    """Bytes that this process's Ray has in segments of raytrainer's, and has ever filled in its store."""
    sizes = _files().values()
    segments = sum(size for name, size in sizes if name.startswith("/memfd"))
    return segments, sum(size for _, size in sizes) - segments


def segment_names() -> set[str]:
    """Those of the segments."""
    names = {name.removeprefix("/memfd:").split()[0] for name, _ in _files().values()}
    return {name for name in names if name.startswith("raytrainer-")}


def family() -> set[int]:
    """This process and all that have come of it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                children.setdefault(int(parent), []).append(int(entry.name))
    found, waiting = set[int](), [os.getpid()]
    while waiting:
        found.add(pid := waiting.pop())
        waiting += children.get(pid, [])
    return found
