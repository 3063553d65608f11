"""Attaching to a cluster: what would fail after half a minute without a reason fails at once, with one."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrainer.driver.cluster.shipping import runtime_environment
from raytrainer.errors import ConfigurationError, ResourceError
from raytrainer.extras import not_installed
from raytrainer.private import ray_private
from raytrainer.signals import shield, sigterm_kept

__all__ = ["answers", "attach", "host_and_port"]

log = logging.getLogger("raytrainer")

#: Seconds in which a cluster's port must accept a connection, and answer.
REACH = 5.0

#: How often a cluster is asked to serve a Ray Client.
TRIES = 3


def attach(address: str, runtime_env: Mapping[str, Any] | None) -> None:
    """Connect this process to a cluster.

    Args:
        address: "HOST:PORT" or "ray://HOST:PORT".
        runtime_env: See `runtime_environment`.

    Raises:
        ConfigurationError: Nothing answers there; it does not let us in; it runs other versions of Python or Ray.
        ResourceError: Ray cannot attach for another reason.
    """
    place = host_and_port(address)
    if place is not None:
        if not answers(*place, REACH):
            port = "the Ray Client's, 10001" if address.startswith("ray://") else "the head node's, 6379"
            raise ConfigurationError(
                f"address={address!r}: nothing answers there. Is the cluster up (`ray status` on its head), is that "
                f"{port} unless told otherwise, and does a firewall let it through?"
            )
        _authenticate(address, place)
        if not address.startswith("ray://") and not _is_member():
            log.warning(
                "No node of a cluster runs on this machine, and address=%r is for members; Ray tries for a minute.",
                address,
            )
    environment = runtime_environment(runtime_env)
    if environment.get("working_dir"):
        log.info("Workers get a copy of %s.", environment["working_dir"])
    began = time.monotonic()
    try:
        _connect(address, environment)
    except ImportError as error:
        raise not_installed(f"address={address!r}", "Ray's client", "cluster") from error
    except Exception as error:
        raise _explained(address, error) from error
    log.info("Attached to the Ray cluster at %s in %.1f s.", address, time.monotonic() - began)


def _connect(address: str, environment: dict[str, Any]) -> None:
    """`ray.init`, up to `TRIES` times where only the process that the cluster started for this client has died."""
    import ray

    for tries_left in reversed(range(TRIES)):
        try:
            with sigterm_kept():
                ray.init(address=address, runtime_env=environment, log_to_driver=True, logging_level=logging.WARNING)
            return
        except KeyboardInterrupt:
            with shield():
                ray.shutdown()
            raise
        except ConnectionAbortedError as error:
            if not tries_left or not ray_private.clients_server_died(error):
                raise
            log.info("The process that the cluster started for this Ray Client died at once; asking for another one.")


def answers(host: str, port: int, seconds: float) -> bool:
    """Whether a connection is accepted there."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError:
        return False
    return True


def _is_member() -> bool:
    """Whether a node of any cluster runs here, as far as can be seen: a container may hide it."""
    found = ray_private.members_addresses()
    return found is None or bool(found)


def host_and_port(address: str) -> tuple[str, int] | None:
    """What "HOST:PORT" or "ray://HOST:PORT" names; None for anything else."""
    host, _, port = address.removeprefix("ray://").split("?")[0].rstrip("/").rpartition(":")
    # another of Ray's schemes, or a name that a plug-in of Ray resolves
    return (host.strip("[]"), int(port)) if host and port.isdigit() and "/" not in host else None


def _token() -> tuple[str, str]:
    """The token for authentication that lies ready here, and where: Ray looks in the same places, in this order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"], "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip(), str(path)
    except OSError:
        return "", str(path)


def _authenticate(address: str, place: tuple[str, int]) -> None:
    """Send a token where one is asked for, and only there.

    Ray itself tries for 20 to 30 s before it gives up, and a Ray Client does not even say why.

    Raises:
        ConfigurationError: The cluster asks for a token that we do not have.
    """
    token, source = _token()
    sends = os.environ.get("RAY_AUTH_MODE") == "token"
    if not _asks_for_token(address, place, token if sends else ""):
        return
    if not sends and token and "RAY_AUTH_MODE" not in os.environ:
        ray_private.send_token()
        sends = True
        if not _asks_for_token(address, place, token):
            return
    raise ConfigurationError(f"address={address!r}: {_locked(token if sends else None, source)}")


def _asks_for_token(address: str, place: tuple[str, int], token: str) -> bool:
    """Whether the cluster, asked for anything, asks for another token than this one first."""
    try:
        import grpc
    except ImportError:
        return False  # then Ray finds out
    service = "RayletDriver/ClusterInfo" if address.startswith("ray://") else "NodeInfoGcsService/CheckAlive"
    host = f"[{place[0]}]" if ":" in place[0] else place[0]
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"{host}:{place[1]}") as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{service}")(b"", metadata=metadata, timeout=REACH)
        except grpc.RpcError as error:
            return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    return False


def _locked(token: str | None, source: str) -> str:
    if token:
        missing = f"the one in {source} is not its own"
    elif os.path.exists(source) or source == "RAY_AUTH_TOKEN":
        missing = f"RAY_AUTH_MODE={os.environ.get('RAY_AUTH_MODE')} keeps the one in {source} from being sent"
    else:
        missing = f"there is none in {source}"
    return (
        f"the cluster asks for a token, and {missing}. Copy ~/.ray/auth_token from its head node to the same place "
        f"here, with mode 0600, or set RAY_AUTH_TOKEN to what it holds; and set RAY_AUTH_MODE=token."
    )


def _explained(address: str, error: Exception) -> Exception:
    """Ray's error as a sentence with a remedy, where the cause can be told."""
    causes: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(causes) < 8:
        causes.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(causes).lower()
    if "authenticat" in text or "invalidauthtoken" in text:
        token, source = _token()
        return ConfigurationError(f"address={address!r}: {_locked(token, source)}")
    if "version" in text and ("mismatch" in text or "different" in text):
        return ConfigurationError(
            f"address={address!r}: the driver and the cluster run different versions. {error} Install the same Python "
            f"and the same Ray on both."
        )
    if not address.startswith("ray://") and any(part in text for part in ("no node", "this node", "raylet", "node ip")):
        return ConfigurationError(
            f"address={address!r}: this machine does not belong to that cluster, and only members can attach in this "
            f"way. From elsewhere use 'ray://HOST:10001' or `ray job submit`, or join it first: "
            f"ray start --address={address} --num-cpus=0."
        )
    return ResourceError(f"address={address!r}: Ray cannot attach. {type(error).__name__}: {error}")
