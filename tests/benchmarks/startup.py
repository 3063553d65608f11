"""Seconds from `fit` to the first training step with two workers.

raytrainer: nothing running, Ray running, and workers warm. Beside it: torchrun, Lightning ddp (if installed), and
`ray.train.TorchTrainer` (its first and its second fit, Ray running). Each figure comes from a fresh process.

Run: python tests/benchmarks/startup.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from step_overhead import loader, make


def mark(path: str) -> None:
    """Note the moment of the first training step, on rank 0."""
    if not Path(path).exists():
        Path(path).write_text(str(time.time()))


def first_step(path: str, begun: float) -> float:
    moment = float(Path(path).read_text())
    Path(path).unlink()
    return moment - begun


def ours(path: str) -> dict[str, float]:
    import torch

    import raytrainer

    logging.getLogger("raytrainer").setLevel(logging.ERROR)

    class Model(raytrainer.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Linear(32, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_rank == 0 and batch_idx == 0:
                mark(path)
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = raytrainer.Trainer(
        strategy="ddp", num_processes=2, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    seconds = {}
    for name in ("nothing running", "Ray running", "warm"):
        if name == "Ray running":
            trainer.close()
        begun = time.time()
        trainer.fit(Model(), loader(20))
        seconds[f"raytrainer, {name}"] = first_step(path, begun)
    trainer.close()
    return seconds


def torch_trainer(path: str) -> dict[str, float]:
    import ray
    import ray.train
    import ray.train.torch
    import torch

    def train() -> None:
        model = ray.train.torch.prepare_model(torch.nn.Linear(32, 2))
        for x, _ in ray.train.torch.prepare_data_loader(loader(20)):
            if ray.train.get_context().get_world_rank() == 0:
                mark(path)
            model(x).square().mean().backward()
        ray.train.report({})

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    seconds = {}
    for name in ("first fit, Ray running", "second fit"):
        begun = time.time()
        with tempfile.TemporaryDirectory() as folder:
            ray.train.torch.TorchTrainer(
                train,
                scaling_config=ray.train.ScalingConfig(num_workers=2),
                run_config=ray.train.RunConfig(storage_path=folder),
            ).fit()
        seconds[f"TorchTrainer, {name}"] = first_step(path, begun)
    ray.shutdown()
    return seconds


def launched(role: str, path: str) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    if role == "lightning":
        command = [sys.executable]
    begun = time.time()
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, __file__, "--role", role, "--path", path], check=True, env=environment, capture_output=True
    )
    return first_step(path, begun)


def torchrun_rank(path: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(32, 2))
    x, _ = next(iter(loader(20)))
    if dist.get_rank() == 0:
        mark(path)
    model(x).square().mean().backward()
    dist.destroy_process_group()


def lightning_rank(path: str) -> None:
    import lightning

    base: Any = make(lightning.LightningModule, 0)

    class Model(base):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_rank == 0:
                mark(path)

    lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    ).fit(Model(), loader(20))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--role", default="")
    parser.add_argument("--path", default="")
    arguments = parser.parse_args()
    roles = {"ours": ours, "torch_trainer": torch_trainer, "torchrun": torchrun_rank, "lightning": lightning_rank}
    if arguments.role:
        print(json.dumps(roles[arguments.role](arguments.path)))
        return
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/first-step"
        for _ in range(arguments.rounds):
            for role in ("ours", "torch_trainer"):
                command = [sys.executable, __file__, "--role", role, "--path", path]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                for name, seconds in json.loads(printed.strip().splitlines()[-1]).items():
                    figures.setdefault(name, []).append(seconds)
            figures.setdefault("torchrun", []).append(launched("torchrun", path))
            if importlib.util.find_spec("lightning"):
                figures.setdefault("Lightning ddp", []).append(launched("lightning", path))
    print("| | median s to the first step |\n|---|---|")
    for name, values in figures.items():
        print(f"| {name} | {statistics.median(values):.3f} |")


if __name__ == "__main__":
    main()
