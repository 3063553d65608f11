"""`NewCheckpoint`: a save under way. Its files are published in one move, or are gone; see `checkpoint_files.py`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self

from raytrainer.checkpointing.checkpoint_files import CheckpointFolder
from raytrainer.checkpointing.checkpoint_meta import META, meta_bytes, named_files, under_way_bytes, under_way_name
from raytrainer.checkpointing.checksums import ChecksummedWriter, FileRecord
from raytrainer.errors import GivenUpError, StorageError

__all__ = ["NewCheckpoint"]

#: How often somebody may remove a new save's folder, or its marker, while it begins.
_ATTEMPTS = 10


class NewCheckpoint:
    """A save under way, for the length of a `with` block: what is not published by its end is deleted again.

    Args:
        folder: Where it goes. It is made, if need be.
        given_up: Asked now and then, whether to leave it at that; then writing and publishing raise GivenUpError.

    Raises:
        CheckpointError: There is a `meta.json` of somebody else's, or nothing can be written there.
    """

    def __init__(self, folder: CheckpointFolder, given_up: Callable[[], bool] | None = None) -> None:
        self.folder, self._storage, self._given_up = folder, folder.storage, given_up
        self._name()
        self.files: dict[str, FileRecord] = {}
        self._expected: set[str] = set()
        self._published = False
        self._stack = ExitStack()

    def _name(self) -> None:
        self.id = uuid.uuid4().hex[:12]
        self._marker, self._new_meta = under_way_name(self.id), f"new-{self.id}.json"

    def __enter__(self) -> Self:
        try:
            replaced = named_files(self.folder.refuse_foreign() or b"")
            for _ in range(_ATTEMPTS):
                if self._begun(replaced):
                    return self
                self._stack.close()
                self._name()
            raise StorageError(f"{self.folder.shown}: somebody else deletes what is written there.")
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError):
                raise self.folder.failure(error) from error
            raise

    def _begun(self, replaced: list[str]) -> bool:
        """Write the marker, and keep it locked; False: somebody has removed the folder meanwhile, or the marker, which
        looked as if nobody was busy with it."""
        folder, storage = self.folder, self._storage
        storage.make_folder(folder.path)
        self._stack.enter_context(storage.locked(folder.path))
        folder.delete_leftovers()
        try:
            folder.write(self._marker, lambda file: file.write(under_way_bytes(self.id, replaced)))
            storage.sync_folder(folder.path)
        except FileNotFoundError:
            return False
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        return self._stack.enter_context(storage.locked(folder.inside(self._marker))) is not False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published:
            self._abandon()
            return
        self._stack.close()
        if self._storage.is_local:
            with suppress(OSError):
                if not self.folder.is_busy():
                    self.folder.delete_leftovers()  # of others that have waited for this one
                self._storage.remove_folder(self.folder.path)  # somebody may have removed all that was in it

    def _abandon(self) -> None:
        """Delete what there is of it; where that fails too, the first failure is the one to tell."""
        with self._stack, suppress(OSError):
            self.folder.delete([*self.files, *self._expected, self._new_meta, self._marker])
            self.folder.delete_leftovers()
            self._storage.remove_folder(self.folder.path)

    def write(self, name: str, save: Callable[[ChecksummedWriter], object]) -> None:
        """Write one of its files; see `CheckpointFolder.write`."""
        self.files[name] = self.folder.write(name, save, self._given_up)

    def given_up(self) -> bool:
        """Whether to leave it at that."""
        return self._given_up is not None and self._given_up()

    @property
    def marker(self) -> str:
        """Name of a file that is there while the save is under way: who sees it sees the folder."""
        return self._marker

    def expect(self, name: str) -> None:
        """This file of it will be written, by `write_part`, in this process or another."""
        self._expected.add(name)

    def take(self, name: str, record: FileRecord) -> None:
        """An expected file has been written, durably.

        Raises:
            CheckpointError: It is not there, or not of that size.
        """
        folder = self.folder
        try:
            with self._storage.open(folder.inside(name)) as file:
                size = file.seek(0, 2)
        except FileNotFoundError:
            size = -1
        except OSError as error:
            raise folder.failure(error, name) from error
        if size != record.bytes:
            raise StorageError(
                f"{folder.shown}/{name}: a worker's node has written {record.bytes:,} bytes there, and here "
                + ("the file is not to be seen." if size < 0 else f"it has {size:,}.")
            )
        self.files[name] = record

    def publish(self, meta: Mapping[str, Any]) -> None:
        """Put all its files in place of the checkpoint that was there.

        Args:
            meta: What else `meta.json` is to say.
        """
        storage, folder = self._storage, self.folder
        try:
            before = folder.refuse_foreign()
            if self.given_up():
                raise GivenUpError(f"{folder.shown}: given up before it was written.")
            folder.write(self._new_meta, lambda file: file.write(meta_bytes(meta, self.files)))
            storage.sync_folder(folder.path)
            storage.replace(folder.inside(self._new_meta), folder.inside(META))
            self._published = True
            storage.sync_folder(folder.path)
            folder.delete(name for name in named_files(before or b"") if name not in self.files)
            storage.sync_folder(folder.path)
            if not folder.is_busy(self.id):  # or else the other, which may not know of this one's files, needs it
                storage.delete(folder.inside(self._marker))
        except OSError as error:
            raise folder.failure(error) from error
