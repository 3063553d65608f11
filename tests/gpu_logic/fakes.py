"""Machines with GPUs that are not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from raytrainer.driver.cluster.placement_rules import ClusterNode
from raytrainer.gpu.nvml import Card

MIB = 2**20


class FakePynvml:
    """pynvml's functions for cards given as (bus id, used MiB, processes), in an order of its own."""

    nvmlMemory_v2 = 2

    def __init__(self, *cards: tuple[str, float, int], old: bool = False) -> None:
        self.cards, self.old = cards, old

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return self.cards[index]

    def nvmlDeviceGetPciInfo(self, handle: Any) -> Any:
        return SimpleNamespace(busId=handle[0].encode())

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return f"GPU-{handle[0]}"

    def nvmlDeviceGetName(self, handle: Any) -> bytes:
        return b"Fake 80GB"

    def nvmlDeviceGetMemoryInfo(self, handle: Any, version: int | None = None) -> Any:
        if self.old and version is not None:
            raise RuntimeError("not supported")
        return SimpleNamespace(used=handle[1] * MIB, total=80000 * MIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in range(handle[2])]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Any) -> list[Any]:
        raise RuntimeError("not permitted")

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        return SimpleNamespace(gpu=37)


def cards(*loads: tuple[float, int]) -> list[Card]:
    """Cards in PCI order, by (used MiB, processes)."""
    return [Card(i, f"GPU-{i}", "Fake", used, 80000, processes) for i, (used, processes) in enumerate(loads)]


class FakeReserver:
    """A cluster: hands out the lowest GPUs first; `busy` are held by other jobs until `free_after` claims of cards."""

    def __init__(self, *gpus: int, busy: dict[str, set[int]] | None = None, grows: bool = False) -> None:
        self._nodes = [ClusterNode(f"n{i}", f"10.0.0.{i}", 16, count) for i, count in enumerate(gpus)]
        self.busy = busy or {}
        self.loads: dict[str, list[Card]] = {}
        self.grows = grows
        self.reserved: list[tuple[str, int | None]] = []
        self.asked_cpus: list[float] = []
        self._ids = 0

    def nodes(self) -> list[ClusterNode]:
        return self._nodes

    def reserve(self, node: ClusterNode, cpus: float) -> Any:
        self.asked_cpus.append(cpus)
        taken = {index for name, index in self.reserved if name == node.id} | self.busy.get(node.id, set())
        free = [index for index in range(node.gpus) if index not in taken]
        self._ids -= 1
        group = (node.id, free[0] if free else self._ids)
        self.reserved.append(group)
        return group

    def ready(self, groups: Any, seconds: float) -> list[Any]:
        return [group for group in groups if group[1] >= 0]

    def held(self, groups: Any) -> list[int]:
        return [index for _, index in groups]

    def give_back(self, groups: Any) -> None:
        for group in groups:
            self.reserved.remove(group)

    def cards(self, node: ClusterNode) -> list[Card]:
        return self.loads.get(node.id, cards(*[(0, 0)] * node.gpus))

    def describe(self) -> str:
        return f"GPU {sum(node.gpus for node in self._nodes)}"
