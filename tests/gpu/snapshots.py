"""What in-memory snapshots cost a GPT on all GPUs: the steps that take longer than others, with and without them.

Run: python tests/gpu/snapshots.py [--gpus 2] [--steps 420] [--compile]
"""

from __future__ import annotations

import argparse
import logging
import statistics
from itertools import pairwise
from typing import Any

import torch
from workloads import WORKLOADS, Workload

import raytrainer


class Timed(raytrainer.Module):
    """Times its steps on the device, and knows when they were, in seconds."""

    def __init__(self, warm: int) -> None:
        super().__init__()
        self.model, self.warm = WORKLOADS["gpt"].model(), warm
        self.times: list[tuple[float, float]] = []

    def on_train_epoch_start(self) -> None:
        self.__dict__["begins"] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.__dict__["begins"].append(torch.cuda.Event(enable_timing=True))
        self.__dict__["begins"][-1].record()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.model(batch[0])
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        torch.cuda.synchronize()
        begins = self.__dict__.pop("begins")
        self.times = [(begins[0].elapsed_time(a) / 1e3, a.elapsed_time(b)) for a, b in pairwise(begins)][self.warm :]

    def configure_optimizers(self) -> Any:
        return WORKLOADS["gpt"].optimizer(self.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    workload = Workload("gpt", arguments.steps, 10)
    for every in ("auto", None, "auto", None):
        module = Timed(workload.warm)
        raytrainer.Trainer(
            gpus=arguments.gpus, strategy="ddp", max_epochs=1, precision=workload.precision, compile=arguments.compile,
            snapshot_every=every, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        ).fit(module, workload.loader(arguments.gpus))  # fmt: skip
        took = [ms for _, ms in module.times]
        median = statistics.median(took)
        print(f"snapshot_every={every!r}: median {median:.2f} ms a step, mean {statistics.fmean(took):.2f}")
        for moment, ms in module.times:
            if ms > 1.1 * median:
                print(f"  at {moment:.1f} s: {ms:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
