"""Seconds from `fit` to the first training step with two workers, on CPUs or on GPUs.

raytrainer: nothing running, Ray running, and workers warm, from their first run and from later ones. Beside it:
Lightning ddp (if installed) and `ray.train.TorchTrainer`, the first and the second fit of each; torchrun, which has no
`fit`, from its start; and the least there is to do with Ray, two tasks that do what torchrun's processes do, from
`ray.init` and, in new processes, with Ray running. In the script's own process: from `fit`; by hand, from the optimizer
on, with which torch imports its compiler; and from `fit` where it has done so. Each figure comes from a fresh process,
torch, and the library, being imported.

Run: python tests/benchmarks/startup.py [--rounds 3] [--gpus 2] [--roles ours torchrun bare_ray in_process ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from step_overhead import loader, make

#: GPUs to use; 0: two CPU processes
GPUS = int(os.environ.get("STARTUP_GPUS", "0"))


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
        strategy="ddp", gpus=GPUS or None, num_processes=None if GPUS else 2, max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    seconds = {}
    # after a worker's first run, Python looks for garbage among all that has been imported in it
    for name in ("nothing running", "Ray running", "second fit at once", "warm"):
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

    ray.init(num_cpus=max(GPUS, 2) + 1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    seconds = {}
    for name in ("first fit, Ray running", "second fit"):
        begun = time.time()
        with tempfile.TemporaryDirectory() as folder:
            ray.train.torch.TorchTrainer(
                train,
                scaling_config=ray.train.ScalingConfig(num_workers=GPUS or 2, use_gpu=GPUS > 0),
                run_config=ray.train.RunConfig(storage_path=folder),
            ).fit()
        seconds[f"TorchTrainer, {name}"] = first_step(path, begun)
    ray.shutdown()
    return seconds


def torchrun(path: str) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={GPUS or 2}"]
    begun = time.time()
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, __file__, "--role", "torchrun_rank", "--path", path],
        check=True,
        env=environment,
        capture_output=True,
    )
    return {"torchrun, from its start": first_step(path, begun)}


def torchrun_rank(path: str) -> dict[str, float]:
    by_hand_rank(path, int(os.environ["LOCAL_RANK"]))
    return {}


def by_hand_rank(path: str, rank: int, init_method: str | None = None) -> None:
    """One of the processes that train by hand."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if GPUS else torch.device("cpu")
    where = {} if init_method is None else {"init_method": init_method, "rank": rank, "world_size": GPUS or 2}
    dist.init_process_group("nccl" if GPUS else "gloo", device_id=device if GPUS else None, **where)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(32, 2).to(device))
    x, _ = next(iter(loader(20)))
    x = x.to(device)
    if rank == 0:
        mark(path)
    model(x).square().mean().backward()
    dist.barrier()  # nobody leaves while another one averages
    dist.destroy_process_group()


def bare_ray(path: str) -> dict[str, float]:
    import ray
    import torch  # noqa: F401

    def work(path: str, rank: int, place: str) -> None:
        os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
        by_hand_rank(path, rank, place)

    seconds = {}
    for name in ("nothing running", "Ray running"):
        begun = time.time()
        if not ray.is_initialized():
            ray.init(
                "local", num_cpus=max(GPUS, 2) + 1, include_dashboard=False, log_to_driver=False,
                logging_level=logging.ERROR,
            )  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        # a task that is the last one of its process, so that the next ones have new ones
        task = ray.remote(num_cpus=1, num_gpus=int(GPUS > 0), max_calls=1)(work)
        ray.get([task.remote(path, rank, place) for rank in range(GPUS or 2)])
        seconds[f"bare Ray, {name}"] = first_step(path, begun)
    ray.shutdown()
    return seconds


def lightning(path: str) -> dict[str, float]:
    """Lightning starts this script again for the other ranks, which come by here too."""
    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    base: Any = make(L.LightningModule, 0)

    class Model(base):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_rank == 0:
                mark(path)

    trainer = L.Trainer(
        max_epochs=1, accelerator="gpu" if GPUS else "cpu", devices=GPUS or 2, strategy="ddp", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    seconds = {}
    for name in ("first fit", "second fit"):
        begun = time.time()
        trainer.fit(Model(), loader(20))
        trainer.fit_loop.max_epochs += 1
        if trainer.is_global_zero:
            seconds[f"Lightning ddp, {name}"] = first_step(path, begun)
    return seconds


def in_process(path: str) -> dict[str, float]:
    import raytrainer

    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    base: Any = make(raytrainer.Module, 0)

    class Model(base):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            mark(path)

    trainer = raytrainer.Trainer(
        strategy="local", gpus=1 if GPUS else None, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    begun = time.time()
    trainer.fit(Model(), loader(20))
    return {"raytrainer, in process": first_step(path, begun)}


def in_process_later(path: str) -> dict[str, float]:
    import torch

    torch.optim.SGD([torch.zeros(1)])
    (seconds,) = in_process(path).values()
    return {"raytrainer, in process, where torch has had its first optimizer": seconds}


def by_hand(path: str) -> dict[str, float]:
    import torch

    begun = time.time()
    model = torch.nn.Linear(32, 2).to("cuda" if GPUS else "cpu")
    torch.optim.SGD(model.parameters(), lr=0.01)
    next(iter(loader(20)))
    mark(path)
    return {"by hand, in process, with its optimizer": first_step(path, begun)}


ROLES = {
    "ours": ours, "torch_trainer": torch_trainer, "torchrun": torchrun, "lightning": lightning,
    "bare_ray": bare_ray, "in_process": in_process, "by_hand": by_hand, "in_process_later": in_process_later,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--roles", nargs="+", default=list(ROLES), choices=ROLES)
    parser.add_argument("--role", default="")
    parser.add_argument("--path", default="")
    arguments = parser.parse_args()
    if arguments.role:
        print(json.dumps({**ROLES, "torchrun_rank": torchrun_rank}[arguments.role](arguments.path)))
        return
    roles = [r for r in arguments.roles if r != "lightning" or importlib.util.find_spec("lightning")]
    environment = {**os.environ, "STARTUP_GPUS": str(arguments.gpus)}
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for role in roles:
                command = [sys.executable, __file__, "--role", role, "--path", f"{folder}/first-step"]
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    raise RuntimeError(f"{role} failed:\n{done.stderr[-3000:]}")
                lines = [line for line in done.stdout.splitlines() if line.startswith("{") and len(line) > 2]
                # two ranks may share a line
                for name, seconds in json.JSONDecoder().raw_decode(lines[-1])[0].items():
                    figures.setdefault(name, []).append(seconds)
    beside = figures.get("torchrun, from its start", [])  # of the same rounds
    print("| | median s to the first step | of torchrun's |\n|---|---|---|")
    for name, values in figures.items():
        ratio = f"{statistics.median(a / b for a, b in zip(values, beside, strict=True)):.2f}" if beside else ""
        print(f"| {name} | {statistics.median(values):.3f} | {ratio} |")


if __name__ == "__main__":
    main()
