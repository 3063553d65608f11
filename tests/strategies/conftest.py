"""Trainers over forked workers: what several workers do, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked_group import ForkedGroups

import raytrainer
from raytrainer import Trainer

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def forked_groups() -> ForkedGroups:
    import torch.distributed.fsdp  # noqa: F401  # once, here, rather than in each worker

    return GROUPS


GROUPS = ForkedGroups()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Workers are kept from file to file: what they have done once they do in a fraction of the time."""
    if nextitem is None or HERE not in nextitem.path.parents:
        GROUPS.close()


@pytest.fixture
def forked(
    forked_groups: ForkedGroups, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., raytrainer.Trainer]:
    """Makes quiet trainers of forked workers: two, unless told otherwise."""

    forked_groups.take_the_place_of_rays(monkeypatch.setattr)

    def make(**options: Any) -> raytrainer.Trainer:
        quiet: dict[str, Any] = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
        }
        if options.get("strategy", "fsdp") != "local":
            quiet |= {"strategy": "fsdp", "num_processes": 2}
        return Trainer(**{**quiet, **options})

    return make
