"""Every Python block in the README runs, from top to bottom, as a reader would run them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  # sets environment variables, which no test may do
import tensorboardX  # noqa: F401  # likewise

import raytrainer
from raytrainer import Callback, WorkerCallback

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python_blocks() -> list[tuple[int, str]]:
    """Line number and code of each block; those marked "python no-run" are left out."""
    found = re.finditer(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [(README.count("\n", 0, match.start(1)), match[1]) for match in found]


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks()
    assert len(blocks) > 5
    names = {"__name__": "readme"}
    for line, code in blocks:
        # empty lines in front, so that tracebacks give the README's line numbers
        exec(compile("\n" * line + code, str(ROOT / "README.md"), "exec"), names)


def test_ci_runs_the_readme_command() -> None:
    commands = re.findall(r"^```sh\n(.*?)\n```$", README, flags=re.MULTILINE | re.DOTALL)
    install_and_test = next(command for command in commands if "pytest" in command)
    assert install_and_test in (ROOT / ".ci" / "run").read_text()


def callbacks_section() -> list[list[str]]:
    section = README.split("\n## Callbacks\n")[1].split("\n## ")[0]
    return [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]


def test_every_callback_is_in_the_table() -> None:
    table = {re.findall(r"\w+", row[0])[0]: row[1].strip() for row in callbacks_section() if len(row) == 3}
    kinds = {
        name: "driver" if issubclass(kind, Callback) else "workers"
        for name, kind in vars(raytrainer).items()
        if isinstance(kind, type) and issubclass(kind, (Callback, WorkerCallback))
    }
    del kinds["Callback"], kinds["WorkerCallback"]
    assert table == kinds


def test_every_hook_is_in_the_table() -> None:
    found: dict[str, tuple[bool, bool, list[str]]] = {}
    for names, driver, workers, when in (row for row in callbacks_section() if len(row) == 4):
        for name, arguments in re.findall(r"`(\w+)(?:\((.*?)\))?`", names + "".join(re.findall("likewise .*", when))):
            found[name] = driver.strip() != "no", workers.strip() == "yes", re.findall(r"\w+", arguments)
    for kind, column in ((Callback, 0), (WorkerCallback, 1)):
        hooks = {name for name in vars(kind) if name in ("setup", "teardown") or name.startswith("on_")}
        assert {name for name, columns in found.items() if columns[column]} == hooks
        for name in hooks:
            parameters = list(inspect.signature(getattr(kind, name)).parameters)[3:]
            if not re.match("on_(test|predict)_batch", name):  # their arguments are those of validation
                assert found[name][2] == parameters, name
            assert getattr(kind, name).__doc__


def test_the_map_names_files_that_exist() -> None:
    text = (ROOT / "raytrainer" / "README.md").read_text()
    have = {path.name for folder in ("raytrainer", "tests") for path in (ROOT / folder).rglob("*.py")}
    named = re.findall(r"`(?:[\w/]*/)?(\w+\.py)`", text)
    assert len(named) > 60 and [name for name in named if name not in have] == []
