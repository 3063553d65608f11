"""What `python -m raytrainer doctor` and missing packages say."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import torch

from raytrainer import doctor, extras
from raytrainer.errors import ConfigurationError

ROOT = Path(__file__).parents[1]


def test_doctor_examines_this_machine():
    done = subprocess.run([sys.executable, "-m", "raytrainer", "doctor"], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "" and done.returncode == ("-> " in done.stdout)
    for what in ("raytrainer", "torch", "ray", "CPUs", "Ray", "own address"):
        assert re.search(rf"^[! ] {what} ", done.stdout, re.MULTILINE), what


def found(what: str) -> doctor.Finding:
    (finding,) = (finding for finding in doctor.examine() if finding.what == what)
    return finding


def test_a_package_that_is_older_than_was_tried(monkeypatch):
    monkeypatch.setattr(extras.metadata, "requires", lambda _: ["ray[train]>=9.48", "torch>=2.1", "rich<99,>=13"])
    assert found("ray").remedy.startswith("older than what was tried: pip install -U 'ray>=9.48'")
    assert found("torch").remedy == found("rich").remedy == ""


def card(index: int) -> SimpleNamespace:
    return SimpleNamespace(index=index, used=100.0, total=80000.0, processes=0, uuid=f"GPU-{index}")


def test_gpus_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(doctor, "open_nvml", lambda: SimpleNamespace(cards=lambda: [card(0), card(1)]))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "100 of 80000 MiB" in found("GPU 1").found
    assert "without CUDA" in found("torch's GPUs").found and "pytorch.org" in found("torch's GPUs").remedy
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cannot use them" in found("torch's GPUs").found and found("torch's GPUs").remedy
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert found("torch's GPUs") == doctor.Finding("torch's GPUs", "2 (CUDA 13.0)")


def test_a_cluster_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "does not answer" in found("Ray").found and found("Ray").remedy


def test_little_shared_memory(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=64e6))
    assert found("shared memory").found.startswith("0.1 GB") and "--shm-size" in found("shared memory").remedy


def test_a_machine_whose_name_leads_nowhere(monkeypatch):
    def fails(_: str) -> str:
        raise OSError("Name or service not known")

    monkeypatch.setattr(doctor.socket, "gethostbyname", fails)
    assert "/etc/hosts" in found("own address").remedy


# ---------------------------------------------------------------- extras

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_every_extra_that_is_named_exists():
    for path in (ROOT / "raytrainer").rglob("*.py"):
        for extra in re.findall(r'not_installed\(f?"[^"]*", "[^"]*", "(\w+)"', path.read_text()):
            assert extra in EXTRAS, f"{path}: {extra}"
        assert not re.search(r"pip install '?raytrainer", path.read_text()), f"{path}: it is on no index"


def test_what_to_install(monkeypatch):
    listed = [
        "torch>=2.6",
        "jsonargparse[signatures]>=4.49; extra == 'cli'",
        "tensorboardX>=2.6 ; extra == 'tensorboard'",
        "tensorboardX>=2.6; extra == 'test'",
    ]
    monkeypatch.setattr(extras.metadata, "requires", lambda _: listed)
    assert extras.requirements("cli") == ["jsonargparse[signatures]>=4.49"]
    assert extras.requirements("tensorboard") == ["tensorboardX>=2.6"]
    assert str(extras.not_installed("A", "tensorboardX", "tensorboard", "use B")) == (
        "A needs tensorboardX, which is not installed: pip install 'tensorboardX>=2.6' (raytrainer's extra "
        "'tensorboard'), or use B."
    )
    assert isinstance(extras.not_installed("A", "b", "none"), ConfigurationError)
