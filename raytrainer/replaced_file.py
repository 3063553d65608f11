"""Text files that are replaced whole: after a kill, a power cut or on a full disk there is the old or the new one."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

__all__ = ["replaced"]


@contextmanager
def replaced(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A new file to be written, which takes the place of `path` at the end of the block, if that does not fail.

    Args:
        path: What links lead to is what is replaced; a file that was there keeps its permissions.
        newline: As for `open`.
    """
    path = path.resolve()
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with new.open("x", newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
