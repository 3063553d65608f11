from __future__ import annotations

import pytest

from raytrainer.plan.culprit import Failed, choose_culprit, is_consequence

USER = Failed(1, "raised", "ValueError", "bad label -1")
LOST = Failed(2, "lost")
GLOO = Failed(0, "raised", "RuntimeError", "[../gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1234")
NCCL = Failed(3, "raised", "DistBackendError", "something about NCCL")


@pytest.mark.parametrize(
    ("failures", "culprit"),
    [
        ([USER], USER),
        ([GLOO, USER], USER),
        ([GLOO, LOST], LOST),  # a process that is gone explains broken connections
        ([LOST, USER], USER),
        ([GLOO, NCCL], GLOO),  # nothing better: the lowest rank
        ([NCCL, GLOO, USER, LOST], USER),
        ([Failed(3, "raised", "KeyError", "x"), USER], USER),  # several users' errors: the lowest rank's
    ],
)
def test_culprit(failures, culprit):
    assert choose_culprit(failures) is culprit
    assert choose_culprit(failures[::-1]) is culprit


@pytest.mark.parametrize(
    ("failure", "expected"), [(USER, False), (LOST, False), (GLOO, True), (NCCL, True),
                              (Failed(0, "raised", "RuntimeError", "Socket Timeout"), True),
                              (Failed(0, "raised", "RuntimeError", "CUDA out of memory"), False),
                              (Failed(0, "raised", "ConnectionResetError", "connection reset by peer"), False)],
)  # fmt: skip
def test_consequence(failure, expected):
    assert is_consequence(failure) is expected
