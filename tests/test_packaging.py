"""What is installed: the whole package with its types and its licence, and nothing else."""

from __future__ import annotations

import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
hatchling = pytest.importorskip("hatchling.build")


@pytest.fixture
def at_the_root(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("at_the_root")
def test_the_wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / hatchling.build_wheel(str(tmp_path))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "raytrainer").rglob("*.py")}
    assert sources <= names and "raytrainer/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"raytrainer", "raytrainer-0.1.0.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "\nProvides-Extra: test\n" in metadata and metadata.count("\n# ") > 0, "the README is the description"


@pytest.mark.usefixtures("at_the_root")
def test_the_source_distribution(tmp_path):
    with tarfile.open(tmp_path / hatchling.build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "raytrainer/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {
        "raytrainer", "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore",
    }  # fmt: skip


@pytest.mark.usefixtures("at_the_root")
def test_editable_installs_are_a_path_that_editors_follow(tmp_path):
    with zipfile.ZipFile(tmp_path / hatchling.build_editable(str(tmp_path))) as wheel:
        (path,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        assert Path(wheel.read(path).decode().strip()) == ROOT
        assert not any(name.endswith(".py") for name in wheel.namelist()), "no import hook"


def test_every_lower_bound_is_tried():
    """.ci/oldest.txt has the first release that each bound allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / ".ci/oldest.txt").read_text().splitlines() if "==" in line)
    listed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    bounds = [re.match(r"([\w.-]+)(?:\[.*\])?(?:>=([\d.]+))?$", one).groups() for one in listed]
    assert {name for name, bound in bounds if bound is None} == {"raytrainer"}
    for name, bound in bounds:
        if bound is not None:
            assert re.fullmatch(rf"{re.escape(bound)}(\.\d+)*", pins[name.lower()]), name
