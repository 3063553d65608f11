"""A cluster that is there already: found, named, reached as a client; shared by jobs; locked; too small; elsewhere."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_models import PATIENCE, alive, eventually
from scripts import INTERRUPTED, check_interruptions, printed_pids, script

from raytrainer.driver.cluster.attaching import attach
from raytrainer.errors import ConfigurationError

BESIDE = "SCALE = 2.0\n"

SCRIPT = """
import logging, os, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
import raytrainer
import beside
from raytrainer.driver.workers.ray_group import RayGroup

RayGroup.stages = True  # as workers with GPUs do
logging.basicConfig(level=logging.INFO, format="%(message)s")

class Net(raytrainer.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.folder = None

    def on_fit_start(self):
        self.print("pids", *[int(pid) for pid in self.all_gather(os.getpid())], "in all", flush=True)

    def training_step(self, batch, batch_idx):
        self.folder = os.getcwd()
        if batch_idx == 0 and self.current_epoch == 0:
            print("printed by", self.global_rank, flush=True)
        return beside.SCALE * (self.layer(batch[0]).squeeze() - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

class Failing(Net):
    def training_step(self, batch, batch_idx):
        print("last words of", self.global_rank, flush=True)
        if self.global_rank == 1:
            raise ValueError("no good")
        return super().training_step(batch, batch_idx)

def data():
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1)), batch_size=16, shuffle=True)

def trainer(**options):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return raytrainer.Trainer(
        strategy="ddp", num_processes=2, max_epochs=6, seed=3, snapshot_every=16, **{**quiet, **options}
    )
"""

TRAIN = (
    SCRIPT
    + """
if __name__ == "__main__":
    address = None if sys.argv[1] == "-" else sys.argv[1]
    net = Net()
    trainer(address=address).fit(net, data())
    assert torch.allclose(net.layer.weight, torch.ones(1, 4), atol=1e-3), net.layer.weight
    # twice: the second time on the same workers, told so in other words
    trainer().fit(net, data())
    print("trained", net.folder != os.getcwd(), flush=True)
    try:
        trainer(address=address).fit(Failing(), data())
    except ValueError as error:
        print("output:", str(error.__cause__).split("its output: ")[1].split(")")[0], flush=True)
"""
)

REFUSED = (
    SCRIPT
    + """
if __name__ == "__main__":
    for address in sys.argv[1:]:
        try:
            trainer(address=address).fit(Net(), data())
        except raytrainer.ConfigurationError as error:
            print("refused:", error, flush=True)
"""
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of one node that asks for a token: its addresses, and the environment of who has the token."""
    home = tmp_path_factory.mktemp("home")
    port, client_port = free_port(), free_port()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "HOME": str(home),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "90",  # what a loaded machine may take to start one
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray's proxy forks a server for each client. Now and then one died right after, and its log has gRPC's poller
        # failing on a closed file: without handlers for forks gRPC starts no poller in the child. That is not the whole
        # cause, as one has died with this too; attaching asks for another server then
        "GRPC_ENABLE_FORK_SUPPORT": "0",
    }
    ray = Path(sys.executable).with_name("ray")
    subprocess.run([ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    command = [
        ray, "start", "--head", "--block", f"--port={port}", f"--ray-client-server-port={client_port}",
        "--num-cpus=4", "--include-dashboard=false", "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    log = home / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env={**environment, "RAY_AUTH_MODE": "token"}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        eventually(lambda: "will now block" in log.read_text() or process.poll() is not None, "a head node")
        assert process.poll() is None, log.read_text()
        host = Path(os.environ.get("TMPDIR", "/tmp"), "ray/ray_current_cluster").read_text().rpartition(":")[0]
        yield {
            "member": f"{host}:{port}",
            "client": f"ray://{host}:{client_port}",
            "pid": str(process.pid),
            **{f"env {name}": value for name, value in environment.items()},
        }
    finally:
        process.terminate()
        process.wait(PATIENCE)


def environment_of(head: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix("env "): value for name, value in head.items() if name.startswith("env ")}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "beside.py").write_text(BESIDE)
    (folder / "train.py").write_text(TRAIN)
    (folder / "refused.py").write_text(REFUSED)
    return folder


def start(
    project: Path, head: dict[str, str], *addresses: str, file: str = "train.py", **environment: str
) -> subprocess.Popen[str]:
    # from another folder, so that a module beside the script is only found if it is shipped
    return subprocess.Popen(
        [sys.executable, str(project / file), *addresses],
        env={**environment_of(head), **environment},
        cwd=project.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check(process: subprocess.Popen[str], where: str) -> None:
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    assert f"fit on 2 workers on 1 node of {where}: {socket.gethostname()} cpu x2" in out
    assert "trained True" in out
    assert "printed by 0" in out and "(rank 0" in out
    assert "printed by 1" not in out, "rank 1 is to be silent"
    kept = Path(next(line for line in out.splitlines() if line.startswith("output: ")).removeprefix("output: "))
    assert "printed by 1" in kept.read_text() and "last words of 1" in kept.read_text()
    pids = printed_pids(out)
    assert len(pids) == 2
    eventually(lambda: not any(map(alive, pids)), "the workers end with the script, which closes nothing")


def test_a_cluster_on_this_machine_is_found(head, project):
    check(start(project, head, "-"), head["member"])


@pytest.mark.sample(0)
def test_two_jobs_share_a_cluster_and_leave_it_running(head, project):
    """One finds the cluster on this machine, the other is told by the environment."""
    found = start(project, head, "-")
    told = start(project, head, "-", RAY_ADDRESS=head["member"])
    check(found, head["member"])
    check(told, head["member"])
    assert alive(int(head["pid"]))


def test_as_a_client(head, project):
    check(start(project, head, head["client"]), head["client"])


@pytest.mark.sample(0)
def test_control_c_as_a_client(head, tmp_path):
    environment = {**environment_of(head), "RAY_ADDRESS": head["client"]}
    with script(tmp_path / "interrupted.py", INTERRUPTED, **environment) as running:
        check_interruptions(running)


def test_a_cluster_that_is_locked(head, project, tmp_path):
    """Told at once, as a member and as a client, rather than after half a minute."""
    process = start(project, head, head["member"], head["client"], file="refused.py", HOME=str(tmp_path))
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    refused = [text for text in out.split("refused: ")[1:] if "asks for a token, and there is none" in text]
    assert len(refused) == 2 and all("auth_token" in text for text in refused), out
    assert "gcs_client" not in out, "it was asked, not tried"


def test_a_token_of_another_cluster(head, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 36)
    with pytest.raises(ConfigurationError, match="the one in RAY_AUTH_TOKEN is not its own"):
        attach(head["client"], {})


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_nothing_answers(address, monkeypatch):
    address = address.format(port=free_port())
    with pytest.raises(ConfigurationError, match="nothing answers there"):
        attach(address, {})
