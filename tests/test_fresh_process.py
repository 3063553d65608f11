"""What a process that begins has imported and started: after the import, with a Trainer, after a run in it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

# one process for all, as an import of torch takes seconds
CODE = """
import json, sys
stages = {}
def note(stage, **more):
    stages[stage] = {"modules": sorted(sys.modules), **more}

from raytrainer import *
note("imported")

import raytrainer, torch
raytrainer.Trainer(gpus=2, logger=False)
from raytrainer.gpu.nvml import open_nvml  # torch may import pynvml by itself
note("a Trainer", nvml=open_nvml.cache_info().currsize > 0, cuda=torch.cuda.is_initialized())

class M(raytrainer.Module):
    def __init__(self):
        super().__init__(); self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch):
        loss = self.layer(batch).sum(); self.log("loss", loss); return loss
    def validation_step(self, batch): self.log("val", self.layer(batch).sum())
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)
trainer = raytrainer.Trainer(strategy="local", max_epochs=1, logger=False, enable_checkpointing=False)
trainer.fit(M(), [torch.ones(1, 1)], [torch.ones(1, 1)])
note("trained", steps=trainer.global_step)
print(json.dumps(stages))
"""


@pytest.fixture(scope="module")
def stages() -> dict[str, dict[str, Any]]:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_importing_does_not_import_what_only_some_use(stages: dict[str, dict[str, Any]]) -> None:
    some = {"ray", "lightning", "tensorboardX", "rich"}
    of_torch = {"torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo", "sympy"}
    assert not (some | of_torch) & set(stages["imported"]["modules"])


def test_a_trainer_starts_neither_nvml_nor_cuda(stages: dict[str, dict[str, Any]]) -> None:
    stage = stages["a Trainer"]
    assert (stage["nvml"], stage["cuda"], "ray" in stage["modules"]) == (False, False, False)


def test_a_run_in_process_imports_neither_ray_nor_torchmetrics(stages: dict[str, dict[str, Any]]) -> None:
    assert stages["trained"]["steps"] == 1
    assert not {"ray", "torchmetrics"} & set(stages["trained"]["modules"])


def test_small_processes_do_without_torch() -> None:
    """They execute Ray Datasets, write shards, and keep copies of some."""
    small = "data.ray.splitter", "checkpointing.part_writer", "worker.actor.keeper"
    code = f"import sys, {', '.join(f'raytrainer.{name}' for name in small)}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "False"
