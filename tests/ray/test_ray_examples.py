"""An example, unchanged, over two Ray workers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DIGITS = Path(__file__).parents[2] / "examples" / "digits.py"


@pytest.mark.usefixtures("ray_session")
def test_digits_over_two_workers(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("example_digits", DIGITS)
    assert spec is not None and spec.loader is not None
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    accuracy = digits.main(["--max-epochs", "3", "--num-processes", "2", "--root", str(tmp_path)])
    assert accuracy > 0.85
