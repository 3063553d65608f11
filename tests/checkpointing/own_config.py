"""A module of the user's own, for hyperparameters that go by its names."""

from __future__ import annotations

import enum
from collections import namedtuple
from dataclasses import dataclass, field
from os import system  # a name that a file must not reach through here  # noqa: F401
from pathlib import Path
from typing import NamedTuple

Kind = enum.Enum("Kind", ["A", "B"])


class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 9


class Parts(enum.Flag):
    HEAD = 1
    BODY = 2


class Text(str, enum.Enum):  # noqa: UP042
    X = "x"


@dataclass(frozen=True)
class Config:
    path: Path
    kind: Kind = Kind.A
    parts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        made.append(self)


#: Every Config that was made by calling it.
made: list[Config] = []


class Pair(NamedTuple):
    left: int
    right: str


Old = namedtuple("Old", "x")


def act(x):
    return x


class Outer:
    class Inner:
        pass
