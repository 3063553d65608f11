"""A worker that Ray kills since its node runs out of memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts import script

HUNGRY = """
import os, time
from pathlib import Path
import ray, torch
import exact

class Hungry(exact.Exact):
    def perish_if_due(self, verb):
        if self.die != (self.global_rank, int(self.batches)) or os.path.exists(self.flag):
            return
        Path(self.flag).touch()
        hoard = []
        for _ in range(60):
            hoard.append(torch.ones(100 << 18))  # 100 MiB
            time.sleep(0.02)  # no faster than Ray looks
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.1)
        raise AssertionError("nobody killed it")

if __name__ == "__main__":
    folder = str(Path(__file__).parent)
    ray.init("local", num_cpus=3, include_dashboard=False)
    options = {"strategy": "ddp", "num_processes": 2, "snapshot_every": 2, "max_epochs": 1}
    calm, struck = exact.Exact(), Hungry((1, 5), "oom", folder + "/flag")
    exact.run(calm, folder, **options)
    trainer, _ = exact.run(struck, folder, **options)
    (recovery,) = trainer.recoveries
    print("same", exact.same(calm, struck), "from step", recovery.resumed_step)
    print("said", recovery.error)
"""


def memory() -> tuple[int, int]:
    """Bytes in use on this machine, and all."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return total - free, total


@pytest.mark.sample(0)
@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="reads /proc/meminfo")
def test_a_worker_killed_for_its_memory(no_ray: Callable[[], None], tmp_path: Path) -> None:
    used, total = memory()
    if used + (6 << 30) > total:
        pytest.skip("needs 6 GiB of free memory")
    environment = {
        "RAY_memory_usage_threshold": str((used + 3.5e9) / total),  # what two workers and Ray take is far below
        "RAY_memory_monitor_refresh_ms": "100",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    with script(tmp_path / "hungry.py", HUNGRY, **environment) as running:
        running.finish()
        assert running.lines("same True from step 2"), running.output.read_text()
        (said,) = running.lines("said ")
        assert "killed for its memory" in said and "smaller batches" in said and len(said) < 600, said
