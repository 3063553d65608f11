"""Power cuts: whatever subset of a save's operations has reached the disk, there is one whole checkpoint."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrainer.checkpointing import places
from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint
from raytrainer.checkpointing.places import checkpoint_exists, remove_checkpoint
from raytrainer.checkpointing.storage import LocalStorage

Operation = tuple[str, str, Any]  # what, where, with what


class Recording(LocalStorage):
    """Does what it is told, and writes down what a disk would see of it, in order."""

    operations: list[Operation]

    def make_folder(self, path: str) -> None:
        missing = list(itertools.takewhile(lambda p: not p.exists(), [Path(path), *Path(path).parents]))
        self.operations += [("folder", str(folder), None) for folder in reversed(missing)]
        super().make_folder(path)

    @contextmanager
    def create(self, path: str) -> Iterator[Any]:
        self.operations.append(("create", path, None))
        with super().create(path) as file:
            yield file
        self.operations.append(("data", path, Path(path).read_bytes()))
        self.operations.append(("sync", path, None))  # what `create` promises; that it calls fsync is tested below

    def replace(self, path: str, target: str) -> None:
        super().replace(path, target)
        self.operations.append(("rename", path, target))

    def sync_folder(self, path: str) -> None:
        super().sync_folder(path)
        self.operations.append(("sync folder", path, None))

    def delete(self, path: str) -> None:
        if Path(path).exists():
            self.operations.append(("delete", path, None))
        super().delete(path)

    def remove_folder(self, path: str) -> None:
        super().remove_folder(path)
        if not Path(path).exists():
            self.operations.append(("remove folder", path, None))


def unsynced(operations: list[Operation]) -> list[int]:
    """Which of these operations a power cut after the last may undo, each on its own."""
    open_ones = []
    for index, (what, path, _) in enumerate(operations):
        if what in ("create", "folder", "rename", "delete", "remove folder"):
            folder = str(Path(path).parent)
            done = any(later == ("sync folder", folder, None) for later in operations[index:])
        elif what == "data":
            done = ("sync", path, None) in operations[index:]
        else:
            continue
        if not done:
            open_ones.append(index)
    return open_ones


def replay(operations: list[Operation], lost: set[int], begin: Path, root: Path, into: Path) -> None:
    """What the disk holds after the operations that were not lost."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(begin, into)

    def there(path: str) -> Path:
        return into / Path(path).relative_to(root)

    made: dict[str, int] = {}  # name -> the operation that made the file, as an inode is
    contents: dict[int, bytes] = {}
    for index, (what, path, value) in enumerate(operations):
        if what == "create":
            made[path] = index
        elif what == "data" and index not in lost:
            contents[made[path]] = value
    made.clear()
    for index, (what, path, value) in enumerate(operations):
        if what == "create":
            made[path] = index
        if index in lost or what.startswith("sync") or what == "data" or not there(path).parent.is_dir():
            continue
        place = there(path)
        if what == "folder":
            place.mkdir(exist_ok=True)
        elif what == "create":
            place.write_bytes(contents.get(index, b""))
        elif what == "rename":
            there(value).write_bytes(contents.get(made[path], b"") if path in made else place.read_bytes())
            place.unlink(missing_ok=True)
        elif what == "delete":
            place.unlink(missing_ok=True)
        elif what == "remove folder" and place.is_dir() and not any(place.iterdir()):
            place.rmdir()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Recording.operations = []
    monkeypatch.setattr(places, "LocalStorage", Recording)
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def state(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "state_dict": {"w": torch.full((10,), float(epoch))}}


def after_every_cut(begin: Path, disk: Path) -> Iterator[tuple[bool, Path]]:
    """(whether all operations had been done, the folder) for each moment of a cut, and each subset that it may undo."""
    operations, into = list(Recording.operations), disk.parent / "after"
    draws = random.Random(0)
    for done in range(len(operations) + 1):
        open_ones = unsynced(operations[:done])
        subsets: Any = itertools.chain.from_iterable(
            itertools.combinations(open_ones, count) for count in range(len(open_ones) + 1)
        )
        subsets = list(subsets)
        for lost in subsets if len(subsets) <= 64 else draws.sample(subsets, 64):
            replay(operations[:done], set(lost), begin, disk, into)
            yield done == len(operations), into


def whole_ones(folder: Path) -> list[int]:
    return [read_checkpoint(path)["epoch"] for path in sorted(folder.glob("**/*.ckpt")) if checkpoint_exists(path)]


@pytest.mark.parametrize("overwritten", [False, True])
def test_one_save(overwritten: bool, disk: Path) -> None:
    path = disk / "runs" / "x.ckpt"
    if overwritten:
        write_checkpoint(path, state(1))
    begin = disk.parent / "begin"
    shutil.copytree(disk, begin)
    Recording.operations.clear()
    write_checkpoint(path, state(2))
    seen = set()
    for all_done, folder in after_every_cut(begin, disk):
        epochs = whole_ones(folder)  # raises, if one is there that is not whole
        assert len(epochs) == 1 or (not epochs and not overwritten and not all_done)
        assert epochs == [2] or not all_done
        seen.add(tuple(epochs))
        if epochs:  # and what a cut save has left does not keep the next one from being made
            write_checkpoint(folder / "runs" / "x.ckpt", state(3))
            names = {file.name.split("-")[0] for file in (folder / "runs" / "x.ckpt").iterdir()}
            # a note of an unfinished save may have lost its content, and then is nobody's
            assert whole_ones(folder) == [3] and names <= {"meta.json", "state", "meta"}
            assert len(list((folder / "runs" / "x.ckpt").glob("state-*"))) == 1
    assert seen == {(2,), (1,) if overwritten else ()}


def test_a_save_and_what_it_replaces(disk: Path) -> None:
    old, new = disk / "runs" / "old.ckpt", disk / "runs" / "new.ckpt"
    write_checkpoint(old, state(1))
    begin = disk.parent / "begin"
    shutil.copytree(disk, begin)
    Recording.operations.clear()
    write_checkpoint(new, state(2))
    remove_checkpoint(old)
    seen = set()
    for _, folder in after_every_cut(begin, disk):
        epochs = whole_ones(folder)
        assert epochs and set(epochs) <= {1, 2}
        seen.add(tuple(sorted(epochs)))
    assert seen == {(1,), (1, 2), (2,)}


def test_files_and_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    import os

    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_checkpoint(tmp_path / "a" / "b.ckpt", state(1))
    names = [name.removeprefix(f"{tmp_path}") for name in synced if name.startswith(str(tmp_path))]
    kinds = [name.split("-")[0] for name in names]
    assert kinds[:2] == ["/a", ""]  # the new folders' names
    files = [kind for kind in kinds[2:] if kind != "/a/b.ckpt"]
    assert files == ["/a/b.ckpt/meta", "/a/b.ckpt/state", "/a/b.ckpt/new"] and kinds[-1] == "/a/b.ckpt"
