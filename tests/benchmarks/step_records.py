"""What `snapshot_every=1` costs: two CPU workers over Ray, by default 100 MB of weights and momentum, steps of 0.1 s.

In turn, round by round: without snapshots; with the whole state copied after each step, as where steps cannot be
recorded; and with each step recorded. Prints the median step of each, and what it adds to that without.

Run: python tests/benchmarks/step_records.py [--rounds 3] [--steps 60] [--megabytes 100] [--milliseconds 100]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from torch import nn

import raytrainer


class Model(raytrainer.Module):
    """Half of its state is weights. A step multiplies `work` matrices.

    Args:
        megabytes: Of state.
        work: How many.
        records: Whether steps may be recorded.
    """

    def __init__(self, megabytes: int, work: int, records: bool) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(2**18)) for _ in range(max(1, megabytes // 2))])
        self.work, self.records = work, records
        self.moments: list[float] = []

    def setup(self, stage: str) -> None:
        from raytrainer.worker import worker

        self.__dict__["made"] = worker.begin_records
        if not self.records:
            worker.begin_records = lambda *args: None

    def teardown(self, stage: str) -> None:
        from raytrainer.worker import worker

        worker.begin_records = self.__dict__.pop("made")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.moments.append(time.perf_counter())
        other = batch
        with torch.no_grad():
            for _ in range(self.work):
                other = (batch @ other).tanh()
        loss = sum(part.mean() for part in self.parts) + other.mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def work_of(milliseconds: float) -> int:
    """Matrices that take so long, one thread in each of two processes."""
    torch.set_num_threads(1)
    batch = other = torch.randn(512, 512)
    began = time.perf_counter()
    for _ in range(50):
        other = (batch @ other).tanh()
    return max(1, round(milliseconds / 1e3 * 50 / (time.perf_counter() - began)))


def step(megabytes: int, work: int, steps: int, every: int | None, records: bool) -> float:
    """Milliseconds."""
    model = Model(megabytes, work, records)
    trainer = raytrainer.Trainer(
        strategy="ddp", num_processes=2, max_steps=steps, max_epochs=-1, snapshot_every=every, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, spares=0,
    )  # fmt: skip
    trainer.fit(model, [torch.randn(512, 512)] * 1000)
    moments = model.moments[5:]
    return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(moments))


SIDES: dict[str, tuple[int | None, bool]] = {
    "no snapshots": (None, False),
    "the state copied after each step": (1, False),
    "each step recorded": (1, True),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--milliseconds", type=float, default=100)
    arguments = parser.parse_args()
    work, found = work_of(arguments.milliseconds), dict[str, list[float]]()
    for _ in range(arguments.rounds):
        for name, side in SIDES.items():
            found.setdefault(name, []).append(step(arguments.megabytes, work, arguments.steps, *side))
    without = statistics.median(found["no snapshots"])
    for name, times in found.items():
        own, rounds = statistics.median(times), ", ".join(f"{time:.1f}" for time in times)
        print(f"{name:34} {own:7.1f} ms a step (+{100 * (own / without - 1):.1f} %)   rounds: {rounds}")


if __name__ == "__main__":
    main()
