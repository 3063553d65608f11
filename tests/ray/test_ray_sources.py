"""What users bring to two workers over Ray, of which one is killed; without Ray: tests/strategies/test_sources.py."""

from __future__ import annotations

import pytest
from killed_sources import SOURCES, check


@pytest.mark.sample(0)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_killed_worker_changes_nothing(kind, ray_trainer, tmp_path):
    check(kind, ray_trainer, tmp_path)
