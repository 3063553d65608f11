"""Milliseconds a step on GPUs: raw torchrun loop, raytrainer over Ray actors, Lightning; eager and compiled.

Run on a machine with GPUs: python tests/gpu/figures.py --gpus 2 [--rounds 2] [--workloads gpt linear] [--kinds eager]
Prints one Markdown table for each workload. With --alternate the loop by hand and raytrainer's run in turn in the same
workers, which what else the machine does disturbs less. With --settings, instead: the GPT on one card and on all, with
settings of DDP that may scale better.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from workloads import WORKLOADS, Workload

sys.path.insert(0, str(Path(__file__).parent))


#: Of rank 0's steps in one run, in milliseconds: the median, which others on a shared machine disturb little; the mean;
#: the looping thread's time on a CPU, median; that of all threads, mean. The latter two say whether the CPU keeps ahead
#: of the GPU, and whether it has more to do on one side than on the other.
Times = tuple[float, float, float, float]

SAID = "median {:.3f} ms, mean {:.3f}; CPU: loop {:.3f}, all {:.3f}"


class Clock:
    """Times the steps after the warm ones on the device, from the begin of one to that of the next."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.begins: list[torch.cuda.Event] = []
        self.cpu: list[float] = []
        self.all_cpu = 0.0

    def before(self, step: int) -> None:
        if step == self.workload.warm:
            self.all_cpu = time.process_time()
        if step >= self.workload.warm:
            self.cpu.append(time.thread_time())
            self.begins.append(torch.cuda.Event(enable_timing=True))
            self.begins[-1].record()

    def milliseconds(self) -> Times:
        of_all = 1e3 * (time.process_time() - self.all_cpu) / len(self.begins)
        of_thread = 1e3 * statistics.median(b - a for a, b in pairwise(self.cpu))
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in pairwise(self.begins)]
        return statistics.median(times), statistics.fmean(times), of_thread, of_all


class ByHand:
    """The loop one would write by hand, of one rank whose process group is there."""

    def __init__(self, workload: Workload, device: torch.device, compiled: bool, rank: int, world: int) -> None:
        from torch.nn.parallel import DistributedDataParallel
        from torch.utils.data import DataLoader
        from torch.utils.data.distributed import DistributedSampler

        self.workload, self.device = workload, device
        self.model: Any = workload.model().to(device)
        self.optimizer = workload.optimizer(self.model.parameters())
        if compiled:
            self.model = torch.compile(self.model)
        source = workload.loader(world)
        sampler = None
        if world > 1:
            self.model = DistributedDataParallel(self.model, device_ids=[device.index], gradient_as_bucket_view=True)
            sampler = DistributedSampler(source.dataset, num_replicas=world, rank=rank, shuffle=False)
        self.data = DataLoader(source.dataset, batch_size=source.batch_size, sampler=sampler, pin_memory=True)

    def epoch(self) -> Times:
        model, optimizer = self.model, self.optimizer
        mixed = self.workload.precision == "bf16-mixed"
        clock = Clock(self.workload)
        for step, (batch,) in enumerate(self.data):
            clock.before(step)
            batch = batch.to(self.device, non_blocking=True)
            with torch.autocast("cuda", dtype=torch.bfloat16) if mixed else contextlib.nullcontext():
                loss = model(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return clock.milliseconds()


def raw(workload: Workload, compiled: bool, out: str) -> None:
    """A rank of torchrun."""
    import torch.distributed as dist

    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl", device_id=device)
    times = ByHand(workload, device, compiled, rank, world).epoch()
    if rank == 0:
        Path(out).write_text(json.dumps(times))
    if world > 1:
        dist.destroy_process_group()


def module_of(base: type[Any], workload: Workload) -> Any:
    """The same module on raytrainer's or Lightning's base class."""

    class Model(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = workload.model()
            self.result: list[float] = []

        def on_train_epoch_start(self) -> None:
            self.__dict__["clock"] = Clock(workload)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.__dict__["clock"].before(batch_idx)

        def on_train_epoch_end(self) -> None:
            self.result = list(self.__dict__.pop("clock").milliseconds())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.model(batch[0])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return workload.optimizer(self.model.parameters())

    return Model


def fit(module: Any, workload: Workload, gpus: int, compiled: bool, **options: Any) -> None:
    """Train raytrainer's module, an epoch unless told otherwise, without a word."""
    import raytrainer

    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    given = {"gpus": gpus, "precision": workload.precision, "compile": compiled, "max_epochs": 1, **quiet, **options}
    raytrainer.Trainer(**given).fit(module, workload.loader(gpus))


def ours(workload: Workload, gpus: int, compiled: bool, strategy: Any = "ddp") -> Times:
    import raytrainer

    module = module_of(raytrainer.Module, workload)()
    fit(module, workload, gpus, compiled, strategy=strategy)
    median, mean, of_thread, of_all = module.result
    return median, mean, of_thread, of_all


def alternating(workload: Workload, gpus: int, rounds: int, compiled: bool) -> str:
    """Both loops in the same workers, an epoch of one after one of the other: what differs is nothing but the loop."""
    import raytrainer

    class Alternating(module_of(raytrainer.Module, workload)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.results: list[tuple[Times, Times]] = []

        def on_train_epoch_start(self) -> None:
            if "hand" not in self.__dict__:
                trainer = self.trainer
                self.__dict__["hand"] = ByHand(workload, self.device, compiled, trainer.global_rank, trainer.world_size)
            self.__dict__["by_hand"] = self.__dict__["hand"].epoch()
            super().on_train_epoch_start()

        def on_train_epoch_end(self) -> None:
            super().on_train_epoch_end()
            self.results.append((self.__dict__["by_hand"], tuple(self.result)))

        def on_train_end(self) -> None:
            del self.__dict__["hand"]

    module = Alternating()
    fit(module, workload, gpus, compiled, max_epochs=rounds)
    hand, own = ([pair[side] for pair in module.results] for side in (0, 1))
    rows = {"by hand": (hand, hand), "raytrainer": (own, hand)}
    for name, (values, _) in rows.items():
        print(name, *(SAID.format(*times) for times in values), sep="\n  ", flush=True)
    return table(f"{workload.name} on {gpus} cards{', compiled' * compiled}, in turn in the same workers", rows)


def lightning(workload: Workload, compiled: bool, out: str, gpus: int) -> None:
    import lightning as L

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        accelerator="gpu", devices=gpus, strategy="ddp" if gpus > 1 else "auto", max_epochs=1, logger=False,
        precision=workload.precision, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    module = module_of(L.LightningModule, workload)()
    trainer.fit(torch.compile(module) if compiled else module, workload.loader(gpus))
    if trainer.is_global_zero:
        Path(out).write_text(json.dumps(module.result))


def launched(role: str, workload: Workload, gpus: int, compiled: bool) -> Times:
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/ms"
        command = [sys.executable]
        if role == "raw":
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        command += [__file__, "--role", role, "--workloads", workload.name, "--gpus", str(gpus), "--out", out]
        command += ["--compiled"] * compiled
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{role} failed:\n{done.stderr[-3000:]}")
        median, mean, of_thread, of_all = json.loads(Path(out).read_text())
        return median, mean, of_thread, of_all


def measure(workload: Workload, gpus: int, rounds: int, kinds: list[bool], others: bool) -> str:
    """Interleaved rounds; a Markdown table of medians over rounds, and of ratios to the raw loop of the same kind."""
    sides: dict[str, Callable[[bool], Times]] = {
        "raw torchrun": lambda compiled: launched("raw", workload, gpus, compiled),
        "raytrainer": lambda compiled: ours(workload, gpus, compiled),
    }
    if others and importlib.util.find_spec("lightning"):
        sides["Lightning"] = lambda compiled: launched("lightning", workload, gpus, compiled)
    figures: dict[tuple[str, bool], list[Times]] = {}
    for _ in range(rounds):
        for compiled in kinds:
            for side, run in sides.items():
                figures.setdefault((side, compiled), []).append(run(compiled))
                # what has been measured is not lost when time is up
                print(workload.name, side, f"{compiled=}", SAID.format(*figures[side, compiled][-1]), flush=True)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "?"
    rows = {
        f"{side}{', compiled' * compiled}": (values, figures["raw torchrun", compiled])
        for (side, compiled), values in figures.items()
    }
    return table(f"{workload.name} on {gpus} x {name}", rows)


def table(title: str, rows: dict[str, tuple[list[Times], list[Times]]]) -> str:
    """Markdown: of each row medians over runs, and medians of ratios to the runs that it is compared with."""
    lines = [
        f"\n{title}, ms a step\n",
        "| | median | ratio | mean | ratio | CPU: loop | ratio | CPU: all | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (values, base) in rows.items():
        cells = [name]
        for kind in range(4):
            cells.append(f"{statistics.median(v[kind] for v in values):.2f}")
            cells.append(f"{statistics.median(v[kind] / b[kind] for v, b in zip(values, base, strict=True)):.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def scaling(workload: Workload, gpus: int, rounds: int) -> str:
    """Median steps on one card and on all of them, with settings of DDP; a Markdown table."""
    import raytrainer

    sides = {
        "1 card": (1, raytrainer.DDP()),
        f"{gpus} cards": (gpus, raytrainer.DDP()),
        "bucket_cap_mb=100": (gpus, raytrainer.DDP(bucket_cap_mb=100)),
        "bucket_cap_mb=250": (gpus, raytrainer.DDP(bucket_cap_mb=250)),
        'gradient_compression="bf16"': (gpus, raytrainer.DDP(gradient_compression="bf16")),
        "both of bf16 and 100 MB": (gpus, raytrainer.DDP(gradient_compression="bf16", bucket_cap_mb=100)),
    }
    figures: dict[str, list[float]] = {}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            count, strategy = sides[name]
            figures.setdefault(name, []).append(ours(workload, count, False, strategy)[0])
            print(f"{name} {figures[name][-1]:.3f} ms", flush=True)
    lines = [f"\n{workload.name}, raytrainer, eager\n", "| | ms a step | share of linear |", "|---|---|---|"]
    for name in sides:
        share = statistics.median(one / v for one, v in zip(figures["1 card"], figures[name], strict=True))
        lines.append(f"| {name} | {statistics.median(figures[name]):.2f} | {100 * share:.1f} % |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workloads", nargs="+", default=["linear", "gpt"])
    parser.add_argument("--kinds", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--settings", action="store_true")
    parser.add_argument("--alternate", action="store_true")
    parser.add_argument("--no-lightning", action="store_true")
    parser.add_argument("--role", default="")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    workload = WORKLOADS[arguments.workloads[0]]
    if arguments.role == "raw":
        raw(workload, arguments.compiled, arguments.out)
    elif arguments.role == "lightning":
        lightning(workload, arguments.compiled, arguments.out, arguments.gpus)
    elif arguments.settings:
        print(scaling(WORKLOADS["gpt"], arguments.gpus, arguments.rounds), flush=True)
    else:
        for name in arguments.workloads:
            kinds = [False] if name == "linear" else [kind == "compiled" for kind in arguments.kinds]
            if arguments.alternate:
                tables = [alternating(WORKLOADS[name], arguments.gpus, arguments.rounds, kind) for kind in kinds]
            else:
                others = not arguments.no_lightning
                tables = [measure(WORKLOADS[name], arguments.gpus, arguments.rounds, kinds, others)]
            print(*tables, sep="\n", flush=True)


if __name__ == "__main__":
    main()
