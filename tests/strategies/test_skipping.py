"""Skipping the rest of an epoch: who waits for whom. Whole runs: test_common_stop.py."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from raytrainer.errors import DisagreementError
from raytrainer.strategies import skipping
from raytrainer.strategies.skipping import skip_together


def test_one_whose_batch_comes_late_is_waited_for(monkeypatch):
    """However long it takes, as long as it is not seen to go on."""
    monkeypatch.setattr(skipping, "_PATIENCE_UNSEEN", 0.0)
    store, looks = dist.HashStore(), []

    def in_step():
        looks.append(len(looks))
        if len(looks) == 3:
            store.add("raytrainer/skip/7/5", 1)
        return []

    skip_together(store, 1, 2, 7, 5, in_step)
    assert looks == [0, 1, 2]


def test_who_goes_on_is_named_at_once():
    with pytest.raises(DisagreementError, match=r"in batch 5 on rank\(s\) \[1\], and not on rank\(s\) \[0, 2\]: all"):
        skip_together(dist.HashStore(), 1, 4, 7, 5, lambda: [0, 2])


@pytest.mark.parametrize("seen", [True, False])
def test_nobody_is_waited_for_for_ever(seen, monkeypatch):
    monkeypatch.setattr(skipping, "_PATIENCE" if seen else "_PATIENCE_UNSEEN", 0.0)
    with pytest.raises(DisagreementError, match=r"on rank\(s\) \[1\], and not on the others within 0 s: all"):
        skip_together(dist.HashStore(), 1, 2, 7, 5, (lambda: []) if seen else None)
