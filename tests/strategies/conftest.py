"""Trainers over forked workers: what several workers do, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_group import ForkedGroup

import raytrainer
from raytrainer import Trainer
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.driver.workers.local_group import local_group


class ForkedGroups:
    """Groups by (workers, nodes), started when they are first asked for, and kept."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], ForkedGroup] = {}

    def take(self, workers: int, nodes: int = 1) -> ForkedGroup:
        key = workers, nodes
        if key not in self._groups or self._groups[key].broken:
            self._groups[key] = ForkedGroup(workers, nodes)
        return self._groups[key]

    def close(self) -> None:
        for group in self._groups.values():
            if not group.broken:
                group.abort()


@pytest.fixture(scope="module")
def forked_groups() -> Iterator[ForkedGroups]:
    import torch.distributed.fsdp  # noqa: F401  # once, here, rather than in each worker

    groups = ForkedGroups()
    yield groups
    groups.close()


@pytest.fixture
def forked(
    forked_groups: ForkedGroups, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., raytrainer.Trainer]:
    """Makes quiet trainers of forked workers: two, unless told otherwise."""

    def take(supply: GroupSupply, settings: Any) -> Any:
        if settings.strategy == "local":
            return local_group(settings)
        return forked_groups.take(settings.world_size, settings.num_nodes)

    monkeypatch.setattr(GroupSupply, "prepare", lambda supply, settings: None)  # they need no Ray
    monkeypatch.setattr(GroupSupply, "take", take)
    monkeypatch.setattr(GroupSupply, "give_back", lambda supply, group: group.release())

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
