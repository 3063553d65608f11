"""Attaching again where the cluster's own process for a client has died."""

from __future__ import annotations

import pytest
import ray

from raytrainer.driver.cluster import attaching
from raytrainer.errors import ResourceError

ZOMBIE = "Initialization failure from server:\n...\npsutil.ZombieProcess: PID still exists but it's a zombie (pid=999)"
DIED = "Initialization failure from server:\n...\nRuntimeError: Starting Ray client server failed. See ray_client_..."


@pytest.fixture
def refused(monkeypatch):
    """Has `ray.init` raise given errors in turn, and work after them; gives the addresses it is called with."""

    def refusing(*errors: Exception) -> list[str]:
        calls: list[str] = []

        def init(address: str, **_: object) -> None:
            calls.append(address)
            if len(calls) <= len(errors):
                raise errors[len(calls) - 1]

        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(attaching, "answers", lambda *_: True)
        monkeypatch.setattr(attaching, "_authenticate", lambda *_: None)
        return calls

    return refusing


def test_a_server_that_dies_as_it_starts_is_asked_for_again(refused):
    calls = refused(ConnectionAbortedError(ZOMBIE), ConnectionAbortedError(DIED))
    attaching.attach("ray://h:1", {})
    assert calls == ["ray://h:1"] * 3


def test_not_for_ever(refused):
    calls = refused(*[ConnectionAbortedError(ZOMBIE)] * 9)
    with pytest.raises(ResourceError, match="ZombieProcess"):
        attaching.attach("ray://h:1", {})
    assert len(calls) == attaching.TRIES


@pytest.mark.parametrize("error", [ConnectionAbortedError("RuntimeEnvSetupError"), ConnectionError(ZOMBIE)])
def test_other_errors_at_once(refused, error):
    calls = refused(error)
    with pytest.raises(ResourceError):
        attaching.attach("ray://h:1", {})
    assert len(calls) == 1
