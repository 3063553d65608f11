"""The examples, for a few steps, in this process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import sklearn.datasets  # noqa: F401  # sets environment variables, which no test may do

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = load("digits").main(["--max-epochs", "3", "--root", str(tmp_path)])
    assert accuracy > 0.85
    assert f"test accuracy: {accuracy:.1%}" in capsys.readouterr().out
    assert list(tmp_path.glob("raytrainer_logs/version_0/checkpoints/*/meta.json"))
    assert (tmp_path / "raytrainer_logs/version_0/metrics.csv").is_file()


def test_charlm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--max-epochs", "1", "--limit-train-batches", "20", "--megabytes", "0.3", "--width", "16", "--sample", "20"]
    bits = load("charlm").main([*few, "--root", str(tmp_path)])
    # a uniform guess costs log2(97) = 6.6 bits
    assert 2.0 < bits < 6.6
    assert f"held-out files: {bits:.2f}" in capsys.readouterr().out


def test_charlm_text_survives_encoding() -> None:
    charlm = load("charlm")
    assert charlm.decode(charlm.encode(b"def f():\n\treturn ~1")) == "def f():\n?return ~1"


def test_charlm_holds_out_whole_files() -> None:
    data = load("charlm").StandardLibrary(megabytes=1.0)
    data.setup("fit")
    train, held_out = len(data.train.tokens), len(data.held_out.tokens)
    assert train + held_out == pytest.approx(1_000_000, rel=0.001)
    assert 0.02 < held_out / train < 0.3
