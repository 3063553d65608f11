"""Ctrl-C in a script that starts Ray itself."""

from __future__ import annotations

import pytest
from scripts import INTERRUPTED, check_interruptions, script


@pytest.mark.sample(0)
@pytest.mark.usefixtures("no_ray")
def test_control_c(tmp_path):
    with script(tmp_path / "interrupted.py", INTERRUPTED) as running:
        check_interruptions(running)
