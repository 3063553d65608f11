"""Seconds that a run loses when something breaks on one of three hosts, and whether its weights end up the same.

    python tests/benchmarks/host_failures.py [worker raylet power cable elastic head]

Needs root: the hosts are Linux namespaces (tests/cluster/lab.py), the cluster is that of cluster/local.yaml. A run
steps every 0.05 s; lost is the time from the blow to the first step that is new.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from bring_up import ENVIRONMENT, Run, bring_up, up, wait_for_nodes  # noqa: E402
from lab import Host, Lab, kept_folders, missing, wait_for  # noqa: E402


def strike(kind: str, victim: Host) -> None:
    if kind == "worker":
        victim.sh("pkill -9 -f ray::RemoteWorker")
    elif kind == "raylet":
        victim.sh("pkill -9 -x raylet")
    elif kind == "cable":
        victim.cut()
    else:
        victim.power_off()


def mend(kind: str, victim: Host, lab: Lab) -> None:
    if kind == "cable":
        victim.heal()
    elif victim.process is None:
        victim.boot()
    began = time.monotonic()
    wait_for_nodes(lab, 240)  # the host is a node again
    print(f"{'':9} the host was a node again {time.monotonic() - began:.0f} s after it was mended", flush=True)


def replaced(kind: str, lab: Lab, folder: Path, expected: str) -> None:
    """Two nodes are asked for, and a third is there."""
    head = lab.hosts[0]
    run = Run(head, folder / kind, f"--num-nodes 2 --root /root/{kind}")
    run.reach(60)
    victim = run.uses(lab.hosts)[-1]
    strike(kind, victim)
    at = time.time()
    reached = run.steps[-1][0]
    equal = run.end(300) == expected
    lost = next((when - at for step, _, when in run.steps if when > at and step > reached + 20), float("nan"))
    print(f"{kind:9} lost {lost:5.1f} s, equal weights: {equal}", flush=True)
    if not equal:
        print(run.text)
    mend(kind, victim, lab)


def elastic(lab: Lab, folder: Path) -> None:
    """Two or three nodes are asked for; one of three goes, and comes back."""
    run = Run(
        lab.hosts[0], folder / "elastic", "--num-nodes 2,3 --epochs 40 --placement-timeout 3 --root /root/elastic"
    )
    run.reach(60)
    victim = run.uses(lab.hosts)[-1]
    at = time.time()
    victim.power_off()
    wait_for(lambda: run.steps[-1][1] == 2, 90, lambda: run.text)
    print(f"elastic   went on with 2 workers after {run.steps[-1][2] - at:.1f} s", flush=True)
    mend("power", victim, lab)
    at = time.time()
    wait_for(lambda: run.steps[-1][1] == 3 or run.process.poll() is not None, 120, lambda: run.text)
    print(f"elastic   had 3 workers again {run.steps[-1][2] - at:.1f} s after that", flush=True)
    lab.hosts[0].sh("pkill -9 -f long_run.py", check=False)


def head_lost(lab: Lab, folder: Path, expected: str) -> None:
    """The driver is a client on the laptop, and has the checkpoints."""
    arguments = "--num-nodes 2 --root /root/head --address ray://h1:10001"
    run = Run(lab.dev, folder / "head", arguments)
    run.reach(60)
    at = time.time()
    lab.hosts[0].power_off()
    assert run.end(300) == ""
    lines = [line for line in run.text.splitlines() if line.strip()]
    print(f"head      the driver ended after {time.time() - at:.1f} s with: {lines[-1]}", flush=True)
    lab.hosts[0].boot()
    began = time.monotonic()
    up(lab)
    print(f"head      the cluster was up again after {time.monotonic() - began:.0f} s", flush=True)
    resumed = Run(lab.dev, folder / "resumed", arguments + " --resume")
    print(f"head      resumed, equal weights: {resumed.end(300) == expected}", flush=True)


def main() -> None:
    kinds = sys.argv[1:] or ["worker", "raylet", "power", "cable", "elastic", "head"]
    reason = missing()
    if reason:
        sys.exit(reason)
    with (
        tempfile.TemporaryDirectory() as name,
        Lab(Path(name) / "lab", 3, list(kept_folders(ROOT)), ENVIRONMENT) as lab,
    ):
        folder, began = Path(name), time.monotonic()
        bring_up(lab)
        print(f"three hosts up in {time.monotonic() - began:.0f} s", flush=True)
        undisturbed = Run(lab.hosts[0], folder / "undisturbed", "--num-nodes 2 --root /root/undisturbed")
        expected = undisturbed.end()
        assert expected, undisturbed.text
        for kind in kinds:
            try:
                if kind == "elastic":
                    elastic(lab, folder)
                elif kind == "head":
                    head_lost(lab, folder, expected)
                else:
                    replaced(kind, lab, folder, expected)
            except AssertionError as error:
                print(f"{kind:9} FAILED: {str(error)[-3000:]}", flush=True)


if __name__ == "__main__":
    main()
