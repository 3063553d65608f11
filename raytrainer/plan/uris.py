"""Paths and URIs as text: joined, taken apart, compared."""

from __future__ import annotations

import os
import re

from raytrainer.errors import ConfigurationError

__all__ = ["absolute", "absolute_or_uri", "is_inside", "is_web", "join_path", "split_query"]


def join_path(base: str, *parts: str) -> str:
    """Join with single slashes, leaving a URI's scheme alone: ("s3://bucket/", "a", "b") gives "s3://bucket/a/b"."""
    joined, query = split_query(base)
    for part in parts:
        if re.fullmatch(r"\w[\w+.-]*:/+|/*", joined):
            joined += part
        else:
            joined = joined.rstrip("/") + "/" + part.lstrip("/")
    return joined + query


def split_query(path: str) -> tuple[str, str]:
    """A URI without its query, and the query with its "?"; a path has none."""
    if "://" not in path:
        return path, ""
    base, mark, query = path.partition("?")
    return base, mark + query


def is_web(path: str) -> bool:
    """Whether it is an address of a web page."""
    return path.startswith(("http://", "https://"))


def is_inside(path: str, folder: str) -> bool:
    """Whether a path or URI lies under a folder; both are taken literally."""
    (path, query), (folder, folder_query) = split_query(path), split_query(folder)
    return query == folder_query and path.startswith(folder if folder.endswith("/") else folder + "/")


def absolute(path: str, shown: str | None = None) -> str:
    """A local path from the root on: "" is the working directory, and "~" the user's home.

    Args:
        path: The path.
        shown: How messages name it.

    Raises:
        ConfigurationError: It is relative to a working directory that has been deleted.
    """
    try:
        return os.path.abspath(os.path.expanduser(path))
    except FileNotFoundError:
        raise ConfigurationError(
            f"{shown or repr(path)}: this process's working directory has been deleted, or cannot be found, and the "
            f"path is relative to it. Give an absolute path, or change to a folder that is there (os.chdir)."
        ) from None


def absolute_or_uri(path: str | os.PathLike[str]) -> str:
    """A URI as it is; a local path as `absolute` has it.

    Raises:
        ConfigurationError: See `absolute`.
    """
    text = os.fspath(path)
    return text if "://" in text else absolute(text)
