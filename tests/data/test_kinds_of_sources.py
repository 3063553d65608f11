"""Whatever people bring, in process and on two workers: each sample once, and a resumed run reads the very same.

The whole table, at five places of each: `python tests/data/kinds_of_sources.py`. Killed workers: `tests/ray`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_group import ForkedGroups
from kinds_of_sources import KINDS, PLACES, measure

from raytrainer import Trainer


@pytest.fixture(scope="module")
def forked_groups() -> Iterator[ForkedGroups]:
    groups = ForkedGroups()
    yield groups
    groups.close()


@pytest.fixture
def environment() -> Iterator[None]:
    """Some libraries set variables when they are imported."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.sample(28)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.ray])
def test_each_sample_once_and_the_same_after_resuming(
    name: str,
    workers: int,
    forked_groups: ForkedGroups,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: None,
) -> None:
    pytest.importorskip(KINDS[name].library)
    forked_groups.take_the_place_of_rays(monkeypatch.setattr)

    def trainer(**options: Any) -> Trainer:
        where: dict[str, Any] = {"strategy": "ddp", "num_processes": 2} if workers == 2 else {"strategy": "local"}
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(**{**where, **quiet, "enable_checkpointing": False, "default_root_dir": tmp_path, **options})

    # each place is that of some kind, and of several; all of them of all kinds take minutes
    place = PLACES[(list(KINDS).index(name) + workers) % len(PLACES)]
    row = measure(name, workers, tmp_path, trainer, places=(place,))
    assert row.once
    assert row.resumed == {place: True}
