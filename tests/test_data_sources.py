"""Every example of the guide to other libraries' data runs, where its library is there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

GUIDE = (Path(__file__).parents[1] / "examples" / "guide" / "data-sources.md").read_text()
LIBRARIES = {
    "Hugging Face datasets": "datasets",
    "WebDataset": "webdataset",
    "litdata": "litdata",
    "mosaicml-streaming": "streaming",
    "PyTorch Geometric": "torch_geometric",
    "TensorDict": "tensordict",
}


def blocks(text: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))


INTRODUCTION, *REST = re.split(r"^## ", GUIDE, flags=re.MULTILINE)
SECTIONS = {section.partition("\n")[0]: section for section in REST}


@pytest.fixture
def environment() -> Any:
    """Some of these libraries set variables when they are imported."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_every_section_has_an_example() -> None:
    assert SECTIONS.keys() == LIBRARIES.keys()
    assert all("rt.Trainer" in blocks(section) for section in SECTIONS.values())


@pytest.mark.parametrize("title", LIBRARIES)
def test_examples(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, environment: None) -> None:
    pytest.importorskip(LIBRARIES[title])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_OPTIMIZER_CACHE_FOLDER", str(tmp_path))
    if title == "litdata":
        from litdata.streaming.cache import Cache

        cache = Cache(str(tmp_path / "streamed"), chunk_size=16)
        for i in range(64):
            cache[i] = {"x": torch.randn(4), "y": torch.tensor(1.0)}
        cache.done()
        cache.merge()
    exec(compile(blocks(INTRODUCTION + SECTIONS[title]), title, "exec"), {"__name__": "guide"})
    assert not [r for r in caplog.records if "batch_size=" in r.getMessage()]
