"""What workers say of their loaders, as one."""

from __future__ import annotations

import pytest

from raytrainer.driver.reporting.merged_counts import longest
from raytrainer.errors import DisagreementError


def test_the_worker_with_most_batches_counts() -> None:
    assert longest([[3, None, 1], [2, 4, 1]]) == [3, None, 1]


def test_as_many_loaders_on_each_worker() -> None:
    with pytest.raises(DisagreementError, match=r"rank\(s\) 0, 2: 1 loader; rank\(s\) 1: 2 loaders. Return as many"):
        longest([[3], [3, 4], [2]])
