"""The files of a checkpoint, whatever is in them: written, checked, deleted. `new_checkpoint.py` publishes them.

    meta-<id>.json     while a save is under way, and locked by it: says that files with <id> in their names belong to
                       it; or a former meta.json, whose checkpoint is being removed
    <name>-<id>.*      the files of the save <id>, never written over
    meta.json          of the newest whole save: names its files, with size and checksum, and has a checksum of its own

Each file is on the disk before `meta.json` is put in place, in one move, and only then the files of the save before
are deleted: at every moment, and after a power cut at any, the folder holds one whole checkpoint, or none.

What may be overwritten or deleted is known by content: files that a `meta.json` or `meta-<id>.json` of this format
names. All else in the folder is somebody else's, and stays.
"""

from __future__ import annotations

import errno
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from raytrainer.checkpointing.checked_reader import CheckedReader, check_file
from raytrainer.checkpointing.checkpoint_meta import (
    META,
    id_under_way,
    named_files,
    read_meta,
    under_way_name,
    written_by_us,
)
from raytrainer.checkpointing.checksums import ChecksummedWriter, FileRecord
from raytrainer.checkpointing.storage import Storage
from raytrainer.errors import CheckpointError, StorageError
from raytrainer.signals import shield

__all__ = ["CheckpointFolder"]

#: Bytes from which on a file is compared while it is read, not before.
_LARGE = 8 * 2**20


@dataclass(frozen=True)
class CheckpointFolder:
    """A place where a checkpoint is, or may be.

    Args:
        storage: The filesystem.
        path: The folder on it.
        shown: Its path or URI as the user knows it.
    """

    storage: Storage
    path: str
    shown: str

    def inside(self, name: str) -> str:
        return f"{self.path}/{name}"

    # ---------------------------------------------------------------- reading

    def meta(self) -> dict[str, Any]:
        """What `meta.json` says.

        Raises:
            CheckpointError: There is none, or it is damaged, foreign, or of a newer version.
        """
        try:
            data = self.storage.read(self.inside(META))
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(
                f"{self.shown}: no checkpoint there (a checkpoint is a directory with a meta.json)."
            ) from None
        except OSError as error:
            raise CheckpointError(f"{self.shown}/{META}: the file cannot be read: {error}") from error
        return read_meta(data, self.shown)

    @contextmanager
    def open(self, name: str, record: FileRecord) -> Iterator[BinaryIO]:
        """One of its files, from its beginning, found to be what was written.

        A large local file is compared while the block reads it, and the end of the block gives the verdict: what was
        made of the file is to be used afterwards only. Other files are compared before.

        Args:
            name: The file.
            record: What `meta.json` says of it.

        Raises:
            CheckpointError: It is missing, or another one.
        """
        shown = f"{self.shown}/{name}"
        try:
            with self.storage.open(self.inside(name)) as file:
                size = file.seek(0, 2)
                file.seek(0)
                if size != record.bytes:
                    raise CheckpointError(
                        f"{shown}: the file has {size} bytes instead of {record.bytes}: it is "
                        f"{'truncated' if size < record.bytes else 'another one'}; use another checkpoint."
                    )
                if self.storage.is_local:
                    if size >= _LARGE:
                        with shield(), CheckedReader(file, record, shown) as checked:
                            yield cast(BinaryIO, checked)  # all that a reader asks of one
                        return
                    check_file(file, record, shown)
                    file.seek(0)
                    yield file
                    return
                from pyarrow import BufferReader, allocate_buffer

                buffer = allocate_buffer(size)
                check_file(file, record, shown, memoryview(buffer).cast("B"))
            yield BufferReader(buffer)
        except FileNotFoundError:
            raise CheckpointError(f"{self.shown}: its state file {name} is missing; use another checkpoint.") from None
        except OSError as error:
            raise CheckpointError(f"{shown}: the file cannot be read: {error}") from error

    # ---------------------------------------------------------------- writing and deleting

    def write(
        self, name: str, save: Callable[[ChecksummedWriter], object], given_up: Callable[[], bool] | None = None
    ) -> FileRecord:
        """Write one new file, durably.

        Args:
            name: Has the id of its save in it: "state-<id>.pt".
            save: Is given the file to write to.
            given_up: Asked now and then, whether to leave it at that.

        Raises:
            CheckpointError: It cannot be written; names the file and the bytes. Nothing of it is left.
        """
        writer: ChecksummedWriter | None = None
        try:
            with self.storage.create(self.inside(name)) as sink:
                writer = ChecksummedWriter(sink, given_up)
                with shield():  # a signal acts within `write`, which keeps what it raises, and not in torch on the way
                    save(writer)
                return writer.record()
        except OSError as error:
            raise self.failure(error, name, writer.bytes if writer else 0) from error

    def failure(self, error: OSError, name: str = "", written: int = 0) -> StorageError:
        """What is told of a file that could not be written."""
        shown = f"{self.shown}/{name}" if name else self.shown
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = self.storage.free_bytes(self.path)
            return StorageError(
                f"{shown}: the disk is full. {written:,} bytes of this file had been written, and are removed again"
                + ("" if free is None else f"; {free:,} bytes are free now")
                + ". Make room, keep fewer checkpoints (save_top_k), or save elsewhere."
            )
        return StorageError(f"{shown}: cannot be written: {error}")

    def remove(self) -> None:
        """Delete the checkpoint, and the folder if nothing else is in it. Where there is none, nothing happens.

        Of a link to one the link is deleted: what it leads to has a name, and may have an owner, of its own.

        Raises:
            StorageError: It cannot be deleted; what is left of it is deleted with the next one there.
        """
        try:
            self._remove()
        except OSError as error:
            raise StorageError(f"{self.shown}: cannot be deleted: {error}") from error

    def _remove(self) -> None:
        data = self._present()
        if data is None or not written_by_us(data):
            return
        if self.storage.is_link(self.path):
            self.storage.delete(self.path)
            return
        taken_as = uuid.uuid4().hex[:12]
        marker = under_way_name(taken_as)
        with suppress(FileNotFoundError):  # somebody else removes it too, and was faster
            # in one move, so that what is deleted is what was there; if this is killed, the next one goes on with it
            self.storage.replace(self.inside(META), self.inside(marker))
            self.storage.sync_folder(self.path)  # from here on it is no checkpoint any more
            self._delete_leftovers_of(taken_as, marker)
        self.delete_leftovers()
        self.storage.remove_folder(self.path)

    def delete(self, names: Iterable[str]) -> None:
        """Delete some of its files."""
        for name in names:
            self.storage.delete(self.inside(name))

    def delete_leftovers(self) -> None:
        """Delete what saves have left that nobody is busy with any more: those that were not finished, and those that
        were while others were under way."""
        for name, save_id in self._markers():
            with self.storage.locked(self.inside(name)) as over:
                if over:
                    self._delete_leftovers_of(save_id, name)

    def is_busy(self, own: str | None = None) -> bool:
        """Whether a save is under way here; `own` is the id of one that does not count."""
        for name, save_id in self._markers():
            if save_id != own:
                with self.storage.locked(self.inside(name)) as over:
                    if over is False and name in self.storage.files(self.path):  # or it has ended just now
                        return True
        return False

    def _markers(self) -> list[tuple[str, str]]:
        """Files that say that a save is under way, and its id."""
        found = ((name, id_under_way(name)) for name in self.storage.files(self.path))
        return [(name, save_id) for name, save_id in found if save_id]

    def _delete_leftovers_of(self, save_id: str, marker: str) -> None:
        try:
            note = self.storage.read(self.inside(marker))
        except FileNotFoundError:  # somebody else has done it
            return
        if written_by_us(note):
            present = named_files(self._present() or b"")  # it may be what is there now
            parts = [part for part in self.storage.files(self.path) if f"-{save_id}" in part and part != marker]
            self.delete(part for part in (*parts, *named_files(note)) if part not in present)
            self.storage.delete(self.inside(marker))

    def refuse_foreign(self) -> bytes | None:
        """The `meta.json` that is there, if there is one.

        Raises:
            CheckpointError: It is somebody else's.
        """
        data = self._present()
        if data is not None and not written_by_us(data):
            raise CheckpointError(
                f"{self.shown}/{META}: this file is not raytrainer's, and a checkpoint here would replace it; "
                "save to another path."
            )
        return data

    def _present(self) -> bytes | None:
        try:
            return self.storage.read(self.inside(META))
        except (FileNotFoundError, NotADirectoryError):
            return None
