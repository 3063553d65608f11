"""What in-memory snapshots cost a GPT on all GPUs: the steps that take longer than others, with and without them.

Run: python tests/gpu/snapshots.py [--gpus 2] [--steps 420] [--compile]
"""

from __future__ import annotations

import argparse
import statistics
from itertools import pairwise
from typing import Any

from figures import fit, module_of
from workloads import Workload

import raytrainer


def timed(workload: Workload) -> Any:
    """The module that figures are of; it also has when each step was, in seconds, and its milliseconds."""

    class Timed(module_of(raytrainer.Module, workload)):  # type: ignore[misc]
        def on_train_epoch_end(self) -> None:
            begins = self.__dict__["clock"].begins
            super().on_train_epoch_end()
            self.times = [(begins[0].elapsed_time(a) / 1e3, a.elapsed_time(b)) for a, b in pairwise(begins)]

    return Timed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    workload = Workload("gpt", arguments.steps, 10)
    for every in ("auto", None, "auto", None):
        module = timed(workload)
        fit(module, workload, arguments.gpus, arguments.compile, strategy="ddp", snapshot_every=every)
        took = [ms for _, ms in module.times]
        median = statistics.median(took)
        print(f"snapshot_every={every!r}: median {median:.2f} ms a step, mean {statistics.fmean(took):.2f}")
        for moment, ms in module.times:
            if ms > 1.1 * median:
                print(f"  at {moment:.1f} s: {ms:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
