"""A cluster of hosts with their own addresses: up, trained on in three ways, a host lost, and down again."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
from conftest import nodes
from lab import Lab, wait_for

pytestmark = pytest.mark.cluster

DIGITS = "examples/digits.py --num-nodes 3 --max-epochs 3"


def accuracy(text: str) -> float:
    found = re.findall(r"test accuracy: ([0-9.]+)%", text)
    assert found, text
    return float(found[-1]) / 100


def where(text: str) -> str:
    found = re.search(r"fit on (.*)", text)
    assert found, text
    return found[1]


def test_driver_on_a_member(cluster: Lab) -> None:
    done = cluster.hosts[0].sh(f"cd ~/raytrainer && python {DIGITS} 2>&1", timeout=180)
    assert "3 workers on 3 nodes of 10.93.0.1:6379: h1 cpu x1; h2 cpu x1; h3 cpu x1" in done.stdout, done.stdout
    assert accuracy(done.stdout) > 0.9


def test_submitted_job(cluster: Lab) -> None:
    command = f"ray job submit --address http://h1:8265 --working-dir . -- python {DIGITS}"
    done = cluster.dev.sh(f"cd ~/raytrainer && {command} 2>&1", timeout=180)
    assert "3 workers on 3 nodes" in where(done.stdout) and "succeeded" in done.stdout
    assert accuracy(done.stdout) > 0.9


def test_client_on_a_laptop(cluster: Lab, tmp_path: Path) -> None:
    done = cluster.dev.sh(f"cd ~/raytrainer && python {DIGITS} --address ray://h1:10001 2>&1", timeout=180)
    assert "3 workers on 3 nodes of ray://h1:10001" in done.stdout, done.stdout
    assert accuracy(done.stdout) > 0.9
