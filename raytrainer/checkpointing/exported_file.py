"""Files of weights for other programs, put in place in one move each, and never over a file of another kind."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raytrainer.checkpointing.storage import LocalStorage
from raytrainer.errors import CheckpointError
from raytrainer.replaced_file import NewFile, beside, sync_folder

__all__ = ["INDEX", "put_in_place"]

#: Ends the name of a file that says which tensors are in which of several.
INDEX = ".index.json"


def put_in_place(files: Mapping[Path, Callable[[str], object]], former: Sequence[Path] = ()) -> None:
    """Have files of weights written beside these paths; once all of them are whole, they take their places.

    So where one cannot be written none of them changes. Who is killed while they take their places leaves files that no
    index leads to, rather than parts of two modules.

    Args:
        files: Local paths. What is there may be replaced if it is a file of weights, or an index of such, too. The last
            one is what readers look for. A function writes a file of the name that it is given.
        former: What readers could find instead, from an earlier export; it is removed.

    Raises:
        CheckpointError: There is something else, or a file cannot be written: what was there is as it was. Or one
            cannot take its place: what is there then is the old weights, the new ones, or nothing that readers find.
    """
    for path in (*files, *former):
        if os.path.lexists(path) and not _holds_weights(path):
            raise CheckpointError(
                f"{path}: what is there holds no weights, and is not replaced; give another name, or delete it."
            )
    with ExitStack() as news:
        written: list[NewFile] = []
        for path, save in files.items():
            written.append(news.enter_context(beside(path)))
            with _told_of(written[-1]):
                save(str(written[-1].path))
                written[-1].sync()
        last = written[-1]
        with _told_of(last):
            if len(written) > 1:
                _remove([*former, last.target])  # while some are new and some old, nothing leads to them
            for new in written:
                new.take_place()
            _remove(former)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if os.path.lexists(path):
            path.unlink()
            sync_folder(path.parent)


@contextmanager
def _told_of(new: NewFile) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        size = new.path.stat().st_size if new.path.exists() else 0
        free = LocalStorage().free_bytes(str(new.target.parent))
        raise CheckpointError(
            f"{new.target}: the weights cannot be written: {error} ({size:,} bytes had been, and are removed again"
            + ("" if free is None else f"; {free:,} bytes are free now")
            + ")."
        ) from error


def _holds_weights(path: Path) -> bool:
    """Whether a file was written by torch or by safetensors, as its first bytes, and a zip's names, tell; or is an
    index of such."""
    try:
        if path.name.endswith(INDEX):
            index = json.loads(path.read_bytes())
            return isinstance(index, dict) and "weight_map" in index
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) == 8 and head[:2] != b"PK" and 2 <= length <= 10**8 and file.peek(1)[:1] == b"{":
                return isinstance(json.loads(file.read(length)), dict)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        pass
    return False
