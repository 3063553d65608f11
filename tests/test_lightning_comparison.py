"""The page that compares names with Lightning's is complete, and is that of what is exported now."""

from __future__ import annotations

import importlib
import json

import lightning_comparison as comparison
import lightning_words
import pytest

HOW = "Classify names in tests/lightning_words.py; python tests/lightning_comparison.py > examples/guide/lightning.md"


def test_the_page_is_of_now():
    assert comparison.PAGE.read_text() == comparison.page(), HOW


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        ({"a", "b"}, {"a"}, r"absent here.*\['b'\]"),
        ({"a"}, {"a", "c"}, r"new here.*\['c'\]"),
        ({"a"}, {"a"}, r"neither's: \['z'\]"),
    ],
)
def test_a_name_without_a_word_is_refused(theirs, ours, told):
    with pytest.raises(SystemExit, match=told):
        comparison.check("T", theirs, ours, {"z": ""} if "z" in told else {}, {})


def test_names_that_are_pointed_at_exist():
    import raytrainer

    page = comparison.PAGE.read_text()
    for name in ("PredictionWriter", "LambdaWorkerCallback", "EMAWeightAveraging", "ProgressBar"):
        assert f"`{name}`" in page and hasattr(raytrainer, name)
    assert set(lightning_words.WORDS) <= set(json.loads(comparison.NAMES.read_text()))


def test_the_names_are_those_of_lightning(monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # which Lightning sets, and leaves behind
    pytest.importorskip("lightning")
    importlib.import_module("lightning.pytorch")
    names = json.loads(comparison.NAMES.read_text())
    installed = comparison.of_lightning()
    if installed["version"] == names["version"]:
        assert installed == names
