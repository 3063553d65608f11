"""A cluster of three hosts, brought up by the command that users are told to use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, kept_folders, missing, wait_for

REPOSITORY = Path(__file__).parents[2]


def adapted(text: str, lab: Lab) -> str:
    """cluster/local.yaml with the lab's hosts and their account, and nothing else changed."""
    head, *workers = [host.address for host in lab.hosts]
    given = {
        "head_ip: 10.0.0.1 ": f"head_ip: {head} ",
        "worker_ips: [10.0.0.2, 10.0.0.3, 10.0.0.4] ": f"worker_ips: [{', '.join(workers)}] ",
        "ssh_user: ubuntu ": "ssh_user: root ",
    }
    for old, new in given.items():
        assert text.count(old) == 1, f"cluster/local.yaml has no {old!r}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three hosts and a laptop."""
    reason = missing()
    if reason:
        pytest.skip(f"no hosts: {reason}")
    environment = {"RAYTRAINER_VENV": sys.prefix, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    with Lab(tmp_path_factory.mktemp("lab"), 3, list(kept_folders(REPOSITORY)), environment) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def cluster(lab: Lab) -> Iterator[Lab]:
    """The hosts, with Ray on them by `ray up cluster/local.yaml`, from the laptop."""
    # the laptop's clone: the files that `ray up` reads, and the one that is edited
    names = "raytrainer cluster examples .ci pyproject.toml README.md LICENSE"
    lab.dev.sh(f"mkdir ~/raytrainer && cd {REPOSITORY} && cp -r {names} ~/raytrainer/")
    config = lab.dev.folder / "root" / "raytrainer" / "cluster" / "local.yaml"
    config.write_text(adapted(config.read_text(), lab))
    lab.dev.sh("bash ~/raytrainer/cluster/setup.sh 3.11")
    lab.dev.sh("umask 077; ray get-auth-token --generate >/dev/null")
    lab.dev.sh("cd ~/raytrainer && ray up -y cluster/local.yaml --no-config-cache", timeout=240)
    wait_for(lambda: nodes(lab) == 3, 120, "three nodes")
    yield lab


def nodes(lab: Lab) -> int:
    """Living nodes of the cluster, as its head counts them."""
    code = "import ray; ray.init('auto', logging_level=40); print(sum(n['Alive'] for n in ray.nodes()))"
    answer = lab.hosts[0].sh(f'python -c "{code}"', check=False).stdout.strip().splitlines()
    return int(answer[-1]) if answer and answer[-1].isdigit() else 0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cluster: makes hosts of Linux namespaces, and a cluster of them")
