"""What it costs to be ready for lost workers, and to lose one. Two CPU workers.

Recovery: from SIGKILL in one worker until who takes its place does the step in which it was killed. In turn with all
workers started anew (as it was before survivors were kept), with survivors kept and a process started for the lost one
(`spares=0`), and with a spare that waits (`spares=1`); beside the time from `fit` to the first step with new workers.
Snapshots: the share of its time that a run with `--megabytes` of state spends on them, by its own report, and steps
beside those of a run without.

Run: python tests/benchmarks/recovery.py [--rounds 3] [--seconds 60] [--megabytes 100] [--gpus 1]
`--seconds 0` leaves snapshots out; `--gpus` measures workers on GPUs, in place of two on CPUs.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import raytrainer
from raytrainer.driver.workers.ray_group import RayGroup


class Model(raytrainer.Module):
    """Steps of 10 to 20 ms, beside `megabytes` of weights that do not train."""

    def __init__(self, megabytes: int = 0, folder: str = "") -> None:
        super().__init__()
        self.ballast = nn.Parameter(torch.zeros(megabytes * 2**18), requires_grad=False)
        self.head = nn.Linear(512, 512)
        self.folder, self.first, self.moments = folder, 0.0, [0.0]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.first = self.first or time.time()
        self.moments.append(time.perf_counter())
        if self.folder and self.global_rank == self.trainer.world_size - 1:
            self._die_once(Path(self.folder))
        for _ in range(10):
            batch = self.head(batch).tanh()
        return batch.square().mean()

    def _die_once(self, folder: Path) -> None:
        """When there is a file "now"; notes the moment in "killed", and in "again" when that step is there again."""
        killed, again = folder / "killed", folder / "again"
        if killed.exists():
            moment, step = killed.read_text().split()
            if not again.exists() and self.global_step >= int(step):
                again.write_text(str(time.time() - float(moment)))
        elif (folder / "now").exists():
            killed.write_text(f"{time.time()} {self.global_step}")
            os.kill(os.getpid(), signal.SIGKILL)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=1e-3)


class Conductor(raytrainer.Callback):
    """Has the worker killed after 20 steps, once a spare is ready where there is to be one, and ends the run then."""

    def __init__(self, folder: str, spares: int) -> None:
        self.folder, self.ready = Path(folder), spares == 0

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        if trainer.global_step >= 20 and self.ready:
            (self.folder / "now").touch()
        trainer.should_stop |= (self.folder / "again").exists()


class Ears(logging.Handler):
    """Hears when a spare is ready."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self.conductor = conductor

    def emit(self, record: logging.LogRecord) -> None:
        self.conductor.ready |= "spare worker is ready" in record.getMessage()


WORKERS: dict[str, Any] = {"num_processes": 2}


def fit(model: Model, **options: Any) -> raytrainer.Trainer:
    trainer = raytrainer.Trainer(
        strategy="ddp", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **WORKERS, **options,
    )  # fmt: skip
    trainer.fit(model, [torch.randn(256, 512)] * 100)
    return trainer


def snapshots(seconds: float, megabytes: int) -> tuple[float, float]:
    """Share of the time that is spent on snapshots, and steps' times beside those without."""
    steps, share = [], 0.0
    for every in ("auto", None):
        model = Model(megabytes)
        trainer = fit(model, max_time={"seconds": seconds}, snapshot_every=every)
        steps.append((model.moments[-1] - model.moments[20]) / (len(model.moments) - 21))
        if every == "auto":
            share = trainer.time_report.saving / trainer.time_report.total
    return share, steps[0] / steps[1]


def cold_start() -> float:
    raytrainer.Trainer(strategy="ddp", logger=False, **WORKERS).close()
    model, begun = Model(), time.time()
    fit(model, max_steps=2).close()
    return model.first - begun


def recovery(spares: int, in_place: bool = True) -> float:
    """Seconds from the kill until its step is done anew."""
    log, mended = logging.getLogger("raytrainer"), RayGroup.mended
    with tempfile.TemporaryDirectory() as folder:
        conductor = Conductor(folder, spares)
        ears = Ears(conductor)
        log.addHandler(ears)
        if not in_place:
            RayGroup.mended = lambda self: None  # type: ignore[method-assign]
        try:
            trainer = fit(Model(folder=folder), max_epochs=-1, snapshot_every=5, spares=spares, callbacks=conductor)
        finally:
            RayGroup.mended = mended  # type: ignore[method-assign]
            log.removeHandler(ears)
        trainer.close()
        (found,) = trainer.recoveries
        assert found.kept == (trainer.world_size - 1 if in_place else 0), found
        return float((Path(folder) / "again").read_text())


WAYS: dict[str, dict[str, Any]] = {
    "all workers anew": {"spares": 0, "in_place": False},
    "survivors kept, spares=0": {"spares": 0},
    "survivors kept, spares=1": {"spares": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--gpus", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.gpus:
        WORKERS.clear()
        WORKERS["gpus"] = arguments.gpus
    ways = {way: given for way, given in WAYS.items() if arguments.gpus != 1 or way != "survivors kept, spares=0"}
    log = logging.getLogger("raytrainer")
    for handler in log.handlers:
        handler.setLevel(logging.CRITICAL)
    fit(Model(), max_steps=2)  # Ray runs from here on
    cold, times = [], {way: [] for way in ways}
    for _ in range(arguments.rounds):
        cold.append(cold_start())
        for way, given in ways.items():
            times[way].append(recovery(**given))
    anew = statistics.median(times["all workers anew"])
    print("| | s | of all workers anew |\n|---|---|---|")
    for way, found in {"from fit to the first step, new workers": cold, **times}.items():
        print(f"| {way} | {statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f}) "
              f"| {statistics.median(found) / anew:.2f} |")  # fmt: skip
    if arguments.seconds:
        shares = [snapshots(arguments.seconds, arguments.megabytes) for _ in range(arguments.rounds)]
        share, slower = (statistics.median(values) for values in zip(*shares, strict=True))
        print(f"\nSnapshots of {arguments.megabytes} MB: {share:.2%} of the time; steps take {slower:.3f} of theirs.")


if __name__ == "__main__":
    main()
