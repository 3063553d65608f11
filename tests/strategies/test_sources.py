"""What users bring to two workers, of which one is killed; Ray Datasets: tests/ray/test_ray_sources.py."""

from __future__ import annotations

from functools import partial

import pytest
from killed_sources import SOURCES, check


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", [kind for kind in SOURCES if "RayDataset" not in kind])
def test_a_killed_worker_changes_nothing(kind, forked, tmp_path):
    check(kind, partial(forked, strategy="ddp"), tmp_path)
