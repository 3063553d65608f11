"""A cluster of hosts with their own addresses: up, trained on in three ways, a host lost, and down again.

In the order of a cluster's life: the last test takes it down.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bring_up import Run, take_down, wait_for_nodes
from lab import Lab, wait_for

pytestmark = pytest.mark.cluster

DIGITS = "--num-nodes 3 --num-processes 1 --max-epochs 3 --root /tmp/digits"
ON_THREE = "fit on 3 workers on 3 nodes of {}: h1 cpu x1; h2 cpu x1; h3 cpu x1"


def accuracy(text: str) -> float:
    found = re.findall(r"test accuracy: ([0-9.]+)%", text)
    assert found, text
    return float(found[-1])


@contextmanager
def open_tunnel(lab: Lab, log: Path, command: str, sign: str) -> Iterator[None]:
    """A command on the laptop that keeps a tunnel to the head open."""
    tunnel = lab.dev.start(f"cd ~/raytrainer && {command}", log)
    try:
        wait_for(lambda: lab.dev.sh(f"ss -ltn | grep -q '{sign}'", check=False).returncode == 0, 30, command)
        yield
    finally:
        lab.dev.sh("pkill -x ssh", check=False)
        tunnel.wait(60)


def test_driver_on_a_member(cluster: Lab) -> None:
    done = cluster.hosts[0].sh(f"cd ~/raytrainer && python examples/digits.py {DIGITS} 2>&1", timeout=180)
    assert ON_THREE.format("10.93.0.1:6379") in done.stdout, done.stdout
    assert accuracy(done.stdout) > 85


@pytest.mark.sample(0)
def test_submitted_job(cluster: Lab, tmp_path: Path) -> None:
    with open_tunnel(cluster, tmp_path / "log", "ray dashboard cluster/local.yaml", "127.0.0.1:8265"):
        submit = "ray job submit --address http://localhost:8265 --working-dir examples"
        done = cluster.dev.sh(f"cd ~/raytrainer && {submit} -- python digits.py {DIGITS} 2>&1", timeout=180)
    assert ON_THREE.format("10.93.0.1:6379") in done.stdout and "succeeded" in done.stdout, done.stdout
    assert accuracy(done.stdout) > 85


@pytest.mark.sample(0)
def test_client_on_a_laptop(cluster: Lab, tmp_path: Path) -> None:
    """Weights come home: the laptop tests them, and has the checkpoints."""
    with open_tunnel(cluster, tmp_path / "log", "ssh -N -L 10001:localhost:10001 h1", "127.0.0.1:10001"):
        command = f"python examples/digits.py {DIGITS} --address ray://localhost:10001"
        done = cluster.dev.sh(f"cd ~/raytrainer && {command} 2>&1; ls /tmp/digits", timeout=180)
    assert ON_THREE.format("ray://localhost:10001") in done.stdout, done.stdout
    assert accuracy(done.stdout) > 85
    assert "raytrainer_logs" in done.stdout


@pytest.mark.sample(0)
def test_a_host_loses_power(cluster: Lab, tmp_path: Path) -> None:
    """The run ends on the host that was left over, with the weights of an undisturbed run; the host comes back."""
    head = cluster.hosts[0]
    undisturbed = Run(head, tmp_path / "undisturbed", "--num-nodes 2 --epochs 2 --root /root/undisturbed")
    expected = undisturbed.end()
    assert expected, undisturbed.text

    struck = Run(head, tmp_path / "struck", "--num-nodes 2 --epochs 2 --root /root/struck")
    struck.reach(40)
    victim = struck.uses(cluster.hosts)[-1]
    assert victim is not head
    victim.power_off()
    struck.recover()
    victim.boot()  # while the run goes on elsewhere
    assert struck.end() == expected, struck.text
    assert "recovery the worker of rank 1 is gone" in struck.text
    wait_for_nodes(cluster, 150)  # the host is one again


def test_down(cluster: Lab) -> None:
    take_down(cluster)
