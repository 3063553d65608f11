"""What tests of memory that CUDA knows share."""

from __future__ import annotations

import pytest
from cuda_memory import Cuda

from raytrainer.gpu import pinned


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(pinned, "register", fake.register)
    monkeypatch.setattr(pinned, "unregister", fake.unregister)
    return fake
