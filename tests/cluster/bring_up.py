"""A cluster on the hosts of a lab, by the commands that users are told to use; and a run on it to be disturbed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lab import Host, Lab, wait_for

__all__ = ["ENVIRONMENT", "REPOSITORY", "Run", "bring_up", "take_down", "up", "wait_for_nodes"]

REPOSITORY = Path(__file__).parents[2]

STATE = "ray status; tail -n 60 /tmp/ray/session_latest/logs/monitor.log"

#: Every host uses this interpreter's environment rather than install one.
ENVIRONMENT = {"RAYTRAINER_VENV": sys.prefix, "RAY_USAGE_STATS_ENABLED": "0"}


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


def bring_up(lab: Lab) -> None:
    """Prepare the laptop as cluster/README.md says, and start the cluster from there."""
    # the laptop's clone: the files that `ray up` reads, and the one that is edited
    names = "raytrainer cluster examples .ci pyproject.toml README.md LICENSE"
    lab.dev.sh(f"mkdir ~/raytrainer && cd {REPOSITORY} && cp -r {names} ~/raytrainer/")
    config = lab.dev.folder / "root" / "raytrainer" / "cluster" / "local.yaml"
    config.write_text(adapted(config.read_text(), lab))
    lab.dev.sh("bash ~/raytrainer/cluster/setup.sh " + ".".join(map(str, sys.version_info[:2])))
    lab.dev.sh("umask 077; ray get-auth-token --generate >/dev/null")
    up(lab)


def up(lab: Lab) -> None:
    """Start Ray on all hosts, and wait until they have joined."""
    lab.dev.sh("cd ~/raytrainer && ray up -y cluster/local.yaml --no-config-cache", timeout=240)
    wait_for_nodes(lab, 300)


def take_down(lab: Lab) -> None:
    """As cluster/README.md says; afterwards nothing of Ray is left on any host."""
    lab.dev.sh("cd ~/raytrainer && ray down -y cluster/local.yaml", timeout=120)
    stops = " ".join(f"ssh {host.name} 'ray stop' &" for host in lab.hosts)
    lab.dev.sh(f"{stops} for job in $(jobs -p); do wait $job || exit 1; done", timeout=60)
    wait_for(lambda: not lab.processes(), 60, lambda: "no process is left: " + "; ".join(lab.processes()))


def wait_for_nodes(lab: Lab, seconds: int) -> None:
    """Wait until all hosts are living nodes of the cluster, as its head counts them."""
    # one process that asks often, as each takes seconds to start
    code = (
        "import ray, time; ray.init('auto', logging_level=40)\n"
        f"while sum(node['Alive'] for node in ray.nodes()) != {len(lab.hosts)}: time.sleep(0.2)"
    )
    done = lab.hosts[0].sh(f'timeout {seconds} python -c "{code}"', timeout=seconds + 60, check=False)
    state = "" if done.returncode == 0 else lab.hosts[0].sh(STATE, check=False).stdout
    assert done.returncode == 0, f"not within {seconds} s: all hosts are nodes: {done.stderr}{state}"


class Run:
    """`long_run.py`, started on a host.

    Args:
        host: Where the driver runs.
        log: Where its output goes.
        arguments: Its command line.
    """

    def __init__(self, host: Host, log: Path, arguments: str) -> None:
        self.host, self.log = host, log
        command = f"cd {REPOSITORY}/tests/cluster && python -u long_run.py {arguments}"
        self.process = host.start(command, log)

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def steps(self) -> list[tuple[int, int, float]]:
        """(step, workers, time) of each line."""
        found = re.findall(r"^step (\d+) world (\d+) at ([\d.]+)$", self.text, re.MULTILINE)
        return [(int(step), int(world), float(at)) for step, world, at in found]

    def reach(self, step: int, seconds: float = 90) -> None:
        """Wait until it is as far as that."""
        wait_for(lambda: self.process.poll() is not None or (self.steps and self.steps[-1][0] >= step), seconds,
                 lambda: self.text)  # fmt: skip
        assert self.process.poll() is None, self.text

    def recover(self, seconds: float = 90) -> None:
        """Wait until it goes on after a loss."""
        wait_for(lambda: self.process.poll() is not None or "Recovered." in self.text, seconds, lambda: self.text)

    def uses(self, hosts: list[Host]) -> list[Host]:
        """Those of the hosts that its workers are on."""
        line = re.findall(r"fit on \d+ workers? on .*", self.text)[-1]
        return [host for host in hosts if f" {host.name} cpu" in line]

    def end(self, seconds: float = 150) -> str:
        """Wait for its end; a fingerprint of the weights, or "" if it failed."""
        wait_for(lambda: self.process.poll() is not None, seconds, lambda: self.text)
        found = re.search(r"^weights (\w+)", self.text, re.MULTILINE)
        return found[1] if found else ""
