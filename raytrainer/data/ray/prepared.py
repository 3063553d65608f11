"""What a run has found out about its Ray Datasets, and read, kept for the next one with the same dataset objects.

Kept as long as workers idle for the next run, for the datasets of the latest run only, while their files are the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrainer.private import ray_private

__all__ = ["Prepared", "files_of", "find", "forget", "keep", "keep_only"]

#: Path, size, number and times of change of each file. The second time nobody can set: it tells of a file that was
#: replaced by one of the same size, with the first time of the old one.
Files = tuple[tuple[str, int, int, int, int], ...]


@dataclass
class Prepared:
    """One dataset.

    Attributes:
        dataset: As the user gave it.
        columns: The columns to read.
        files: What it read from.
        cluster: In which Ray.
        listed: The dataset with its files listed, its rows and its bytes.
        blocks: References to its blocks, the rows of each, and their bytes; None: it is executed in each epoch.
    """

    dataset: Any
    columns: tuple[str, ...] | None
    files: Files
    cluster: str
    listed: tuple[Any, int | None, int | None]
    blocks: tuple[list[Any], list[int], int] | None = None


_known: list[Prepared] = []


def find(dataset: Any, columns: Sequence[str] | None) -> Prepared | None:
    """What is known of this very object, if its files have not changed since."""
    for known in _known:
        if known.dataset is dataset and known.columns == _named(columns) and known.cluster == _cluster():
            return known if known.files == files_of(dataset) else None
    return None


def keep(
    dataset: Any, columns: Sequence[str] | None, listed: tuple[Any, int | None, int | None], files: Files | None
) -> Prepared | None:
    """Keep what is known of a dataset; None where nobody could tell whether its files change.

    Args:
        dataset: As the user gave it.
        columns: The columns to read.
        listed: See `Prepared`.
        files: What `files_of` gave before they were listed.
    """
    if files is None:
        return None
    known = Prepared(dataset, _named(columns), files, _cluster(), listed)
    _known[:] = [other for other in _known if other.dataset is not dataset or other.columns != known.columns]
    _known.append(known)
    return known


def keep_only(datasets: Sequence[Any]) -> None:
    """Forget all but these, which are a run's."""
    _known[:] = [known for known in _known if any(known.dataset is dataset for dataset in datasets)]


def forget() -> None:
    """Let go of everything."""
    _known.clear()


def files_of(dataset: Any) -> Files | None:
    """The local files that a dataset reads, as they are now; None where they are elsewhere, or not known."""
    paths = ray_private.paths_read(dataset)
    if not paths:
        return None
    found = []
    for path in paths:
        root = Path(path)
        try:
            for file in _within(root) if root.is_dir() else [root]:
                status = os.stat(file)
                found.append((str(file), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns))
        except OSError:
            return None
    return tuple(found)


def _within(root: Path) -> list[Path]:
    """All files below a folder, also behind links, and the folders."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back
            folders.clear()
            continue
        seen.add(real)
        found += [Path(folder), *(Path(folder, name) for name in files)]
    return sorted(found)


def _named(columns: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if columns is None else tuple(columns)


def _cluster() -> str:
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node
