"""Reservation of chosen GPUs by a real Ray that believes to have some."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import ray
from ray.util.placement_group import remove_placement_group
from ray_models import eventually

from raytrainer import ConfigurationError, ResourceError
from raytrainer.driver.cluster import reservation as reserve
from raytrainer.driver.cluster.placement_rules import Request, Slot


@pytest.fixture(scope="module")
def four_gpus(ray_ended: Callable[[], None]) -> Iterator[None]:
    ray_ended()
    ray.init("local", num_cpus=4, num_gpus=4, include_dashboard=False)
    yield
    ray_ended()


def free() -> float:
    return float(ray.available_resources().get("GPU", 0))


def indices(slots: list[Slot]) -> list[int]:
    return reserve.RayReserver().held([slot.group for slot in slots])


@pytest.mark.sample(0)
def test_chosen_gpus(four_gpus: None) -> None:
    chosen = reserve.place(Request(1, 2, True, indices=(1, 3)), 20)
    assert indices(chosen) == [1, 3]
    eventually(lambda: free() == 2, "the others are free again")
    # another job gets what is left, and only that
    others = reserve.place(Request(1, 2, True, indices=(0, 2)), 20)
    assert indices(others) == [0, 2]
    with pytest.raises(ResourceError, match=r"GPU 3 in PCI order.*not to be had within"):
        reserve.place(Request(1, 1, True, indices=(3,)), 1)
    threading.Timer(1.0, lambda: remove_placement_group(chosen[1].group)).start()
    third = reserve.place(Request(1, 1, True, indices=(3,)), 60)
    assert indices(third) == [3]
    for slot in (chosen[0], *others, *third):
        remove_placement_group(slot.group)
    eventually(lambda: free() == 4, "all are free")
    with pytest.raises(ConfigurationError, match=r"gpus=\[7\]: this node has GPUs 0-3 \(PCI order\)"):
        reserve.place(Request(1, 1, True, indices=(7,)), 60)
    eventually(lambda: free() == 4, "all are free")


@pytest.mark.sample(0)
def test_impossible_number(four_gpus: None) -> None:
    with pytest.raises(ResourceError, match=r"5 worker\(s\).*GPU 4 of 4 free.*4 GPU"):
        reserve.place(Request(1, 5, True), 60)
    assert reserve.all_gpus(1) == 4
