"""Packages that only some parts need: what to say where one is missing."""

from __future__ import annotations

import re
from importlib import metadata

from raytrainer.errors import ConfigurationError

__all__ = ["lower_bound", "not_installed", "requirements"]


def requirements(extra: str) -> list[str]:
    """What an extra of this package asks for, as pip takes it; empty where the package's metadata cannot be read."""
    marked = (re.split(r"\s*;\s*", line, maxsplit=1) for line in _declared())
    return [parts[0] for parts in marked if len(parts) == 2 and re.search(rf"extra == ['\"]{extra}['\"]", parts[1])]


def lower_bound(package: str) -> str:
    """The oldest release of a package that this one was tried with; "" where it does not say."""
    bounds = (re.match(rf"{re.escape(package)}(?:\[.*?\])?\s*>=\s*([\d.]+)", line) for line in _declared())
    return next((bound[1] for bound in bounds if bound), "")


def _declared() -> list[str]:
    try:
        return metadata.requires("raytrainer") or []
    except metadata.PackageNotFoundError:
        return []


def not_installed(what: str, package: str, extra: str, instead: str = "", where: str = "") -> ConfigurationError:
    """The error for `what`, which needs a package of an extra.

    Args:
        what: What was asked for.
        package: What it imports, as pip calls it.
        extra: The extra that has it.
        instead: What could be done without.
        where: Of which process this is said, if it is not plain.
    """
    wanted = " ".join(f"'{requirement}'" for requirement in requirements(extra) or [package])
    return ConfigurationError(
        f"{what} needs {package}, which is not installed{where}: pip install {wanted} (raytrainer's extra {extra!r})"
        f"{f', or {instead}' if instead else ''}."
    )
