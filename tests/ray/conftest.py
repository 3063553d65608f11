"""One Ray for the session. raytrainer keeps its groups warm between tests, so most of them cost well under a second."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from quiet_trainers import quiet

import raytrainer
from raytrainer.driver.workers import idle_pool as pool
from raytrainer.driver.workers.ray_group import RayGroup

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ray: starts real Ray actors")
    config.addinivalue_line(
        "markers", "late(n): ends the two workers that most tests share, or needs others: comes last, by n"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("ray")
    # each pair of workers that is started anew takes seconds
    marks = {item: item.get_closest_marker("late") for item in items}
    items.sort(key=lambda item: mark.args[0] if (mark := marks[item]) else 0)


def end_ray() -> None:
    import ray

    pool.close_idle()
    ray.shutdown()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ray ends after the last test here: others are not to use it, nor to run beside what it goes on doing."""
    if nextitem is None or HERE not in nextitem.path.parents:
        end_ray()


@pytest.fixture(scope="session")
def ray_ended() -> Callable[[], None]:
    """A function that ends the session's Ray."""
    return end_ray


@pytest.fixture(scope="module")
def staging(ray_ended: object) -> Iterator[None]:
    """Workers copy states aside and hand them over by a thread, as those of GPUs do. They are left to nobody."""
    with pytest.MonkeyPatch.context() as patch:
        pool.close_idle()
        patch.setattr(RayGroup, "stages", True)
        yield
        pool.close_idle()
        pool.set_idle_timeout(300.0)


@pytest.fixture
def ray_session(ray_ended: Callable[[], None]) -> str:
    """The session's Ray, started by the first test that wants it; its address."""
    import ray

    if not ray.is_initialized():
        # workers import test modules by their names, as pytest does here
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        ray.init("local", num_cpus=4, include_dashboard=False)
    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def no_ray(ray_ended: Callable[[], None]) -> None:
    """No Ray is running."""
    ray_ended()


@pytest.fixture
def ray_trainer(ray_session: str, tmp_path: Path) -> Callable[..., raytrainer.Trainer]:
    """Makes quiet trainers over Ray workers, two unless told otherwise."""

    def make(**options: Any) -> raytrainer.Trainer:
        return quiet(tmp_path, **{"strategy": "ddp", "num_processes": 2, **options})

    return make


@pytest.fixture
def one_process(tmp_path: Path) -> Callable[..., raytrainer.Trainer]:
    """Makes quiet trainers of the driver's process, to compare with."""

    def make(**options: Any) -> raytrainer.Trainer:
        return quiet(tmp_path, **{"strategy": "local", **options})

    return make
