"""A cluster of three hosts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bring_up import ENVIRONMENT, REPOSITORY, bring_up
from lab import Lab, kept_folders, missing


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cluster: makes hosts of Linux namespaces, and a cluster of them")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three hosts and a laptop, with Ray on the hosts."""
    reason = missing()
    if reason:
        pytest.skip(f"no hosts: {reason}")
    with Lab(tmp_path_factory.mktemp("lab"), 3, list(kept_folders(REPOSITORY)), ENVIRONMENT) as lab:
        bring_up(lab)
        yield lab
