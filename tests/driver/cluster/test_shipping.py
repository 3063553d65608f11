"""What workers are sent beside the task."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import ray

from raytrainer.driver.cluster import shipping
from raytrainer.driver.cluster.session import Cluster, attached
from raytrainer.driver.cluster.shipping import runtime_environment, script_directory
from raytrainer.errors import ConfigurationError


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    """The folder of a script that is being run."""
    main = ModuleType("__main__")
    main.__file__ = str(tmp_path / "train.py")
    main.__spec__ = None
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    return tmp_path


def test_the_folder_of_the_script(script):
    assert script_directory() == script.resolve()
    environment = runtime_environment(None)
    assert environment["working_dir"] == str(script.resolve())
    assert "*.ckpt/" in environment["excludes"]


@pytest.mark.parametrize("how", ["notebook", "module", "installed"])
def test_else_the_working_directory(how, script, tmp_path, monkeypatch):
    main = sys.modules["__main__"]
    if how == "notebook":
        del main.__file__
    elif how == "module":
        main.__spec__ = object()
    else:
        main.__file__ = str(Path(sys.prefix) / "bin" / "pytest")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert script_directory() == tmp_path / "elsewhere"


def test_what_is_given_counts(script):
    assert runtime_environment({"pip": ["a"]}) == {"pip": ["a"]}
    assert runtime_environment({}) == {}


def test_a_submitted_job_has_its_own(script, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert runtime_environment(None) == {}


def test_a_large_folder_is_refused(script, monkeypatch):
    monkeypatch.setattr(shipping, "LIMIT", 1000)
    (script / "data").mkdir()
    (script / "data" / "big.bin").write_bytes(bytes(2000))
    with pytest.raises(ConfigurationError, match=r"data \(0 MiB\).*runtime_env={} ships nothing"):
        runtime_environment(None)


@pytest.mark.parametrize("name", [".venv", "run.ckpt", "__pycache__", "wandb", "weights.pt"])
@pytest.mark.parametrize("git", [True, False])
def test_what_is_left_out_does_not_count(name, git, script, monkeypatch):
    monkeypatch.setattr(shipping, "LIMIT", 1000)
    if git:
        subprocess.run(["git", "init", "-q", str(script)], check=True)
    path = script / name if "." in name[1:] and not name.endswith(".ckpt") else script / name / "big.bin"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(2000))
    assert runtime_environment(None)["working_dir"] == str(script.resolve())


@pytest.mark.parametrize("file", [".gitignore", ".rayignore"])
def test_what_is_ignored_does_not_count(file, script, monkeypatch):
    if file not in (Path(ray.__file__).parent / "_private/runtime_env/packaging.py").read_text():
        pytest.skip("this Ray does not know that file")
    monkeypatch.setattr(shipping, "LIMIT", 1000)
    (script / file).write_text("data/\n")
    (script / "data").mkdir()
    (script / "data" / "big.bin").write_bytes(bytes(2000))
    assert runtime_environment(None)["working_dir"] == str(script.resolve())
    (script / "more.bin").write_bytes(bytes(2000))
    with pytest.raises(ConfigurationError, match=r"more\.bin"):
        runtime_environment(None)


@pytest.mark.parametrize("address", ["", 6379, ["a"]])
def test_an_address_that_is_none(address):
    with pytest.raises(ConfigurationError, match="address="):
        Cluster(address)


def test_a_runtime_env_that_is_none():
    with pytest.raises(ConfigurationError, match="runtime_env="):
        Cluster(None, ["numpy"])  # type: ignore[arg-type]


def test_local_is_not_a_cluster(monkeypatch):
    monkeypatch.setattr("sys.modules", {k: v for k, v in sys.modules.items() if k != "ray"})
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert attached(Cluster(None)) and attached(Cluster("ray://h:10001")) and not attached(Cluster("local"))
