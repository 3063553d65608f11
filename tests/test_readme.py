"""Every Python block of the README and of each guide runs, from top to bottom, as a reader would run them; links lead
somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets environment variables, which no test may do
import tensorboardX  # noqa: F401  # likewise

import raytrainer
from raytrainer import Callback, WorkerCallback

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


GUIDE = ROOT / "examples" / "guide"
#: Pages with tests of their own, since they need other libraries or several workers.
ELSEWHERE = {"data.md", "data-sources.md", "sharded-models.md"}
PAGES = [ROOT / "README.md", *(p for p in sorted(GUIDE.glob("*.md")) if p.name not in ELSEWHERE)]
RUNNABLE = [page for page in PAGES if "\n```python\n" in page.read_text()]
LINKING = [
    *sorted(GUIDE.glob("*.md")),
    *(ROOT / folder / "README.md" for folder in (".", "cluster", "raytrainer", "tests/benchmarks", "tests/gpu")),
    ROOT / "CHANGELOG.md",
]


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Line number and code of each block; those marked "python no-run" are left out."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(GUIDE)
    names = {"__name__": page.stem}
    for line, code in python_blocks(page.read_text()):
        # empty lines in front, so that tracebacks give the page's line numbers
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_the_port_from_lightning_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its diff leads to, in one process."""
    diff = (GUIDE / "from-lightning.md").read_text().split("```diff\n")[1].split("```")[0]
    code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    for given, tried in {"num_processes=2,": "", '"ddp"': '"local"', "max_epochs=20": "max_epochs=2"}.items():
        assert given in code
        code = code.replace(given, tried)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "port"}
    exec(compile(code, "from-lightning.md", "exec"), names)
    names["main"]()


def anchors(page: Path) -> set[str]:
    """Of a page's titles, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_guide_is_linked_from_the_readme() -> None:
    assert [page.name for page in GUIDE.glob("*.md") if f"(examples/guide/{page.name}" not in README] == []


def test_the_readme_is_read_to_its_end() -> None:
    assert README.count("\n") <= 240


def test_ci_runs_the_readme_command() -> None:
    commands = re.findall(r"^```sh\n(.*?)\n```$", README, flags=re.MULTILINE | re.DOTALL)
    install_and_test = next(command for command in commands if "pytest" in command)
    assert install_and_test in (ROOT / ".ci" / "run").read_text()


def callbacks_section() -> list[list[str]]:
    page = (GUIDE / "callbacks.md").read_text()
    return [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]


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
