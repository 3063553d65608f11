"""`meta.json`: which files make up a checkpoint, and how it is known that this package wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from raytrainer.checkpointing.checksums import CHECKSUM, FileRecord, seal, unseal
from raytrainer.errors import CheckpointError

__all__ = [
    "FORMAT_VERSION",
    "META",
    "id_under_way",
    "is_own_name",
    "is_readable",
    "meta_bytes",
    "named_files",
    "read_meta",
    "under_way_bytes",
    "under_way_name",
    "written_by_us",
]

META = "meta.json"
FORMAT = "raytrainer-checkpoint"
#: Version 1 had no checksums, and is still read.
FORMAT_VERSION = 2

_UNDER_WAY = re.compile(r"meta-([0-9a-f]{12})\.json")
#: Files are named after their save, so that nobody else's are taken for them.
_OWN_FILE = re.compile(r"[A-Za-z0-9_][\w.-]*-[0-9a-f]{12}[\w.-]*")
_BEGIN = re.compile(rb'\s*\{\s*"format": "%s"' % FORMAT.encode())
_END = re.compile(rb'"checksum": "%s"\s*\}\s*$' % CHECKSUM.encode())


def meta_bytes(meta: Mapping[str, Any], files: Mapping[str, FileRecord]) -> bytes:
    """The file's content."""
    names = {name: record.as_json() for name, record in files.items()}
    return seal({"format": FORMAT, "version": FORMAT_VERSION, **meta, "files": names})


def under_way_bytes(save_id: str, replaced: Sequence[str]) -> bytes:
    """The content of `meta-<id>.json`, as long as the save is not finished.

    Args:
        save_id: Its id.
        replaced: The files that are to go when it is.
    """
    return seal({"format": FORMAT, "version": FORMAT_VERSION, "under_way": save_id, "files": dict.fromkeys(replaced)})


def under_way_name(save_id: str) -> str:
    """Of the file that says that a save, or a removal, is under way."""
    return f"meta-{save_id}.json"


def id_under_way(name: str) -> str | None:
    """The id of the save that a `meta-<id>.json` is about, if it is one; None: it is no such file."""
    found = _UNDER_WAY.fullmatch(name)
    return found[1] if found else None


def written_by_us(data: bytes) -> bool:
    """Whether a `meta.json` is, or was before it was damaged, one of this format."""
    meta = _parse(data)
    if meta is None:
        return _BEGIN.match(data) is not None or _END.search(data) is not None
    if not isinstance(meta, dict):
        return False
    checksum = meta.get("checksum")
    return meta.get("format") == FORMAT or (isinstance(checksum, str) and re.fullmatch(CHECKSUM, checksum) is not None)


def is_readable(data: bytes) -> bool:
    """Whether a `meta.json`, of anybody's, is JSON."""
    return _parse(data) is not None


def is_own_name(name: str) -> bool:
    """Whether a file is named as those of a checkpoint are: no proof that it is one."""
    return name != META and _OWN_FILE.fullmatch(name) is not None


def named_files(data: bytes) -> list[str]:
    """The files that belong to a `meta.json`, damaged or not, as far as it can be read."""
    meta = _parse(data)
    if not isinstance(meta, dict):
        return []
    files = meta.get("files")
    names = [meta.get("state"), *(files if isinstance(files, dict) else ())]
    return [name for name in dict.fromkeys(names) if isinstance(name, str) and _OWN_FILE.fullmatch(name)]


def read_meta(data: bytes, shown: str) -> dict[str, Any]:
    """What a `meta.json` says, with its "files" as `FileRecord` by name.

    Args:
        data: Its content.
        shown: The checkpoint's path or URI, for messages.

    Raises:
        CheckpointError: It is damaged, foreign, or of a newer version.
    """
    meta = _parse(data)
    if not written_by_us(data):
        if meta is None:
            raise CheckpointError(f"{shown}/{META}: meta.json is damaged; use another checkpoint.")
        raise CheckpointError(f"{shown}: this is not a checkpoint of raytrainer.")
    sealed = meta is None or "checksum" in meta or "files" in meta
    if meta is None or (sealed and unseal(data) is None):
        raise CheckpointError(
            f"{shown}/{META}: meta.json is damaged: it is not what was written; use another checkpoint."
        )
    version = meta.get("version")
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{shown}: it has format version {version}, this raytrainer reads up to {FORMAT_VERSION}; it was "
            f"written by {meta.get('versions')}. Upgrade raytrainer."
        )
    files: dict[str, FileRecord | None] = {}
    if version == 1 and not sealed and type(meta.get("bytes")) is int:
        files = {str(meta.get("state")): FileRecord(meta["bytes"], None)}
    elif version == FORMAT_VERSION and sealed and isinstance(meta.get("files"), dict):
        files = {name: FileRecord.from_json(record) for name, record in meta["files"].items()}
    whole = bool(files) and all(_OWN_FILE.fullmatch(name) and record for name, record in files.items())
    if meta.get("format") != FORMAT or not whole:
        raise CheckpointError(f"{shown}: this is not a checkpoint of raytrainer.")
    return {**meta, "files": files}


def _parse(data: bytes) -> Any:
    """Its content, or None if that is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
