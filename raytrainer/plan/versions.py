"""Whether the driver and the nodes run the same software, as far as it matters."""

from __future__ import annotations

from collections.abc import Mapping

from raytrainer.plan.folding import few

__all__ = ["differences"]

#: Weights, reports and verbs of these travel between driver and workers, so they must agree to so many places.
_MUST_AGREE = {"Python": 2, "Ray": 3, "raytrainer": 3}

#: These usually get along; a build for CPUs on the driver and one for GPUs on the nodes is quite usual.
_SHOULD_AGREE = {"torch": 2}


def differences(own: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]]) -> tuple[list[str], list[str]]:
    """What differs between the driver and the nodes.

    Args:
        own: The driver's versions, by package.
        nodes: Each node's, by address.

    Returns:
        Differences that cannot work, and those that may matter: "torch 2.6.0 here, 2.8.0 on 10.0.0.2".
    """
    found: list[list[str]] = []
    for places in (_MUST_AGREE, _SHOULD_AGREE):
        lines = []
        for package, count in places.items():
            others: dict[str, list[str]] = {}
            for address, versions in nodes.items():
                if _head(versions[package], count) != _head(own[package], count):
                    others.setdefault(versions[package], []).append(address)
            lines += [
                f"{package} {own[package]} here, {version} on {few(where, 4)}" for version, where in others.items()
            ]
        found.append(lines)
    return found[0], found[1]


def _head(version: str, count: int) -> list[str]:
    """The first parts of a version, without its build: "2.6.0+cu124" has 2, 6, 0."""
    return version.split("+")[0].split(".")[:count]
