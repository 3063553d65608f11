"""Three hundred of the inputs of `fuzz.py`; more by its command."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import fuzz


def test_nothing_but_errors_of_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = fuzz(300, 1, tmp_path)
    assert [outcome for outcome in found if "WRONG" in outcome] == []
    assert found["damaged_checkpoint: CheckpointError"] == 38  # not one was read
    refused = "forged_state: CheckpointError", "forged_shards: CheckpointError", "configuration: ConfigurationError"
    assert all(found[kind] > 10 for kind in refused), found
