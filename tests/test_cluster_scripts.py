"""The scripts in `cluster/` with stand-ins for Slurm and Ray, and whether documents, scripts and pins agree."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import ray  # sets environment variables, which no test may do
import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
PINS = dict(line.split("==") for line in (ROOT / ".ci/constraints.txt").read_text().splitlines() if "==" in line)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXTS = {path.name: path.read_text() for path in sorted(CLUSTER.iterdir()) if path.is_file()}
YAMLS = [name for name in TEXTS if name.endswith(".yaml")]

#: Commands that a Slurm node has, as stand-ins that write down how they were called.
STANDINS = {
    "scontrol": """
        [ "$1" = requeue ] && echo "scontrol $*" >>"$LOG" && exit
        printf 'n%s\\n' 1 2 3 4""",
    "hostname": "echo '10.0.0.1 172.17.0.1 '",
    "ip": "[ $6 = ib0 ] && echo '3: ib0    inet 10.1.0.1/24 brd 10.1.0.255 scope global ib0'",
    "srun": """
        echo "srun $*" >>"$LOG"
        while [[ $1 == --* ]]; do shift; done
        exec "$@" """,
    "ray": """
        echo "ray $*" >>"$LOG"
        case $1 in
            get-auth-token) mkdir -p ~/.ray && echo secret >~/.ray/auth_token ;;
            start) echo $$ >>"$LOG.pids" && exec sleep 60 ;;
        esac""",
    # waits as the real one does until all have joined: here, until Ray was started twice
    "python": """
        if [ "$1" = - ]; then
            until [ "$(grep -c "^ray start" "$LOG")" = 2 ]; do :; done
            exit 0
        fi
        trap 'echo saved >>"$LOG"; exit 143' TERM
        echo "python $* RAY_ADDRESS=$RAY_ADDRESS RAY_AUTH_MODE=$RAY_AUTH_MODE" >>"$LOG"
        [ "$1" = long.py ] && while :; do read -rt 0.1 <> <(:) || :; done
        exit 3""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder, and the environment of a Slurm batch script in it."""
    commands = tmp_path / "venv" / "bin"
    commands.mkdir(parents=True)
    for name, body in STANDINS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LOG": str(tmp_path / "log"),
        "RAYTRAINER_VENV": str(tmp_path / "venv"),
        "SLURM_JOB_ID": f"test-{os.getpid()}",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_CPUS_PER_TASK": "16",
    }
    return tmp_path, environment


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_slurm_starts_ray_runs_the_script_and_ends_everything(slurm: tuple[Path, dict[str, str]]) -> None:
    folder, environment = slurm
    done = run(environment, "bash", str(CLUSTER / "slurm.sh"), "python", "train.py", "--gpus", "1")
    assert done.returncode == 3, f"not the script's own: {done.stderr}"
    log = (folder / "log").read_text().splitlines()
    (head,) = [line for line in log if line.startswith("ray start --head")]
    assert "--node-ip-address=10.0.0.1 --port=6379 --num-cpus=16" in head
    (others,) = [line for line in log if line.startswith("ray start --address")]
    assert "--address=10.0.0.1:6379 --num-cpus=16" in others
    steps = [line for line in log if line.startswith("srun")]
    assert any("--nodes=1 --ntasks=1 --nodelist=n1 ray start --head" in step for step in steps)
    assert any("--nodes=3 --ntasks=3 --exclude=n1" in step for step in steps)
    (script,) = [line for line in log if line.startswith("python")]
    assert script == "python train.py --gpus 1 RAY_ADDRESS=10.0.0.1:6379 RAY_AUTH_MODE=token"
    assert steps[-1].endswith(f"rm -rf /tmp/ray-{environment['SLURM_JOB_ID']}")
    token = folder / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    pids = [int(pid) for pid in (folder / "log.pids").read_text().split()]
    assert len(pids) == 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "Ray goes on"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # those of pydantic about Ray
def test_slurm_chooses_a_network_and_ray_knows_its_options(slurm: tuple[Path, dict[str, str]]) -> None:
    from ray.scripts.scripts import start

    folder, environment = slurm
    run({**environment, "INTERFACE": "ib0"}, "bash", str(CLUSTER / "slurm.sh"), "python", "train.py")
    lines = [line for line in (folder / "log").read_text().splitlines() if line.startswith("ray start")]
    head, other = (start.make_context("start", line.split()[2:]).params for line in sorted(lines, reverse=True))
    assert head["block"] and other["block"]
    assert head["node_ip_address"] == "10.1.0.1"
    assert other["address"] == "10.1.0.1:6379"


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_queues_the_job_again_before_its_time_is_over(
    number: signal.Signals, again: bool, slurm: tuple[Path, dict[str, str]]
) -> None:
    """But not when somebody cancels it."""
    folder, environment = slurm
    job = subprocess.Popen(["bash", str(CLUSTER / "slurm.sh"), "python", "long.py"], env=environment)
    log, deadline = folder / "log", time.monotonic() + 60
    while not (log.exists() and "python long.py" in log.read_text()):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait(60) == 143
    lines = log.read_text().splitlines()
    cleared, queued = (
        f"rm -rf /tmp/ray-{environment['SLURM_JOB_ID']}",
        f"scontrol requeue {environment['SLURM_JOB_ID']}",
    )
    assert "saved" in lines
    assert (lines[-1] == queued) == again and lines[-1 - again].endswith(cleared)


def test_slurm_needs_a_command(slurm: tuple[Path, dict[str, str]]) -> None:
    folder, environment = slurm
    done = run(environment, "bash", str(CLUSTER / "slurm.sh"))
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
    assert not (folder / "log").exists()


#: `sbatch --help` has these; Slurm refuses a job with others.
SBATCH = {
    "job-name", "nodes", "gpus-per-node", "cpus-per-task", "time", "ntasks-per-node", "exclusive", "no-kill", "output",
    "partition", "account", "signal", "requeue", "open-mode",
}  # fmt: skip


def test_slurm_directives() -> None:
    lines = TEXTS["slurm.sh"].splitlines()
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    options = [re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", lines[i]) for i in directives]
    assert all(option and option[1] in SBATCH for option in options)
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(directives) < first, "Slurm reads no directive after the first command"


# ---------------------------------------------------------------- setup.sh


@pytest.fixture
def node(tmp_path: Path) -> dict[str, str]:
    """The environment of a node whose virtual environment is the one that runs this test."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    # nothing may be fetched
    (tmp_path / "bin").mkdir()
    curl = tmp_path / "bin" / "curl"
    curl.write_text("#!/bin/sh\necho 'no network' >&2\nexit 6\n")
    curl.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(tmp_path), "RAYTRAINER_VENV": str(tmp_path / "venv")}


def test_setup_leaves_a_complete_environment_alone_and_makes_shells_find_it(node: dict[str, str]) -> None:
    if ray.__version__ != PINS["ray"]:
        pytest.skip("this environment has other releases")
    home = Path(node["HOME"])
    (home / ".bashrc").write_text("case $- in *i*) ;; *) return ;; esac\n")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for _ in range(2):
        done = run(node, "bash", str(CLUSTER / "setup.sh"), version)
        assert done.returncode == 0, done.stderr
        assert (home / ".bashrc").read_text().startswith(". ~/.raytrainer.sh\ncase")
        assert (home / ".bashrc").read_text().count("raytrainer") == 1
    found = run(node, "bash", "-c", ". ~/.bashrc; command -v python; echo $RAY_AUTH_MODE")
    assert found.stdout.split() == [f"{node['RAYTRAINER_VENV']}/bin/python", "token"]


def test_setup_sees_another_python(node: dict[str, str]) -> None:
    done = run(node, "bash", str(CLUSTER / "setup.sh"), "3.99")
    assert done.returncode == 1
    assert "to be installed: Python 3.99 (has 3." in done.stderr
    assert "has another Python: remove it" in done.stderr
    assert not (Path(node["HOME"]) / ".raytrainer.sh").exists()


def test_setup_fetches_a_python_that_is_not_there(node: dict[str, str]) -> None:
    done = run({**node, "RAYTRAINER_VENV": f"{node['HOME']}/other"}, "bash", str(CLUSTER / "setup.sh"), "3.99")
    assert done.returncode != 0
    assert "no network" in done.stderr
    assert not (Path(node["HOME"]) / ".raytrainer.sh").exists()


# ---------------------------------------------------------------- documents, pins


@pytest.mark.parametrize("name", TEXTS)
def test_named_files_exist(name: str) -> None:
    paths = set(re.findall(r"(?<![\w/.])(?:cluster|examples|\.ci)/[\w.-]+\w", TEXTS[name]))
    assert paths or name == "kuberay.yaml"
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", [*YAMLS, "slurm.sh"])
def test_what_to_edit_is_marked_and_how_to_use_it_is_said(name: str) -> None:
    assert 1 <= TEXTS[name].count("EDIT") <= 7
    command = {"slurm.sh": "sbatch"}.get(name, "kubectl apply -f" if "kube" in TEXTS[name] else "ray up")
    assert f"{command} cluster/{name}" in TEXTS[name]
    assert f"{command} cluster/{name}" in TEXTS["README.md"]


@pytest.mark.parametrize("name", [n for n in TEXTS if n.endswith(".sh")])
def test_scripts_parse(name: str) -> None:
    done = run(dict(os.environ), "bash", "-n", str(CLUSTER / name))
    assert done.returncode == 0, done.stderr


def test_readme_commands_parse() -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", TEXTS["README.md"], flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) > 8
    for block in blocks:
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{block}{done.stderr}"


def test_versions_agree() -> None:
    jobs = [yaml.safe_load(TEXTS[name])["spec"] for name in ("kuberay.yaml", "rayjob.yaml")]
    specs = [job.get("rayClusterSpec", job) for job in jobs]
    assert specs[0] == specs[1], "the job's cluster is not the one of kuberay.yaml"
    assert specs[0]["rayVersion"] == PINS["ray"]
    (base,) = re.findall(r"^FROM rayproject/ray:([\d.]+)-py(\d)(\d+)-gpu$", TEXTS["Dockerfile"], flags=re.MULTILINE)
    python = f"{base[1]}.{base[2]}"
    assert base[0] == PINS["ray"]
    groups = [specs[0]["headGroupSpec"], *specs[0]["workerGroupSpecs"]]
    (image,) = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    assert f"-t {image} " in TEXTS["Dockerfile"]
    all_text = "\n".join(TEXTS.values())
    named = set(re.findall(r"(?:setup\.sh |python=\$\{1:-|\bpython)(3\.\d+)", all_text))
    assert named == {python}
    lowest, highest = re.fullmatch(r">=(3\.\d+),<(3\.\d+)", PROJECT["requires-python"]).groups()
    minor = [int(version.split(".")[1]) for version in (lowest, python, highest)]
    assert minor[0] <= minor[1] < minor[2]


def test_installed_extras_and_packages_are_the_projects() -> None:
    extras = {
        extra
        for name in ("setup.sh", "Dockerfile", "README.md")
        for found in re.findall(r"-e [^\s\[]*\[([a-z,]+)\]", TEXTS[name])
        for extra in found.split(",")
    }
    assert {"cluster", "examples"} <= extras <= set(PROJECT["optional-dependencies"])
    # what the clouds' launchers need besides
    for name in ("aws", "gcp"):
        (command,) = yaml.safe_load(TEXTS[f"{name}.yaml"])["head_setup_commands"]
        packages = command.split("constraints.txt ")[1]
        assert set(packages.split()) <= set(PINS)
        assert f"`pip install -c .ci/constraints.txt {packages}`" in TEXTS["README.md"]


@pytest.mark.parametrize("name", TEXTS)
def test_no_secret_is_written_down(name: str) -> None:
    assert all(value.startswith("$(") for value in re.findall(r"RAY_AUTH_TOKEN=(\S*)", TEXTS[name]))
