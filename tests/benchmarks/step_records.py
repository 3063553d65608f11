"""What `snapshot_every=1` costs: two CPU workers over Ray, or GPUs; 100 MB of weights and momentum, steps of 0.1 s.

In turn, round by round: without snapshots; with the whole state copied after each step, as where steps cannot be
recorded; and with each step recorded. Prints the median step of each, and what it adds to that without: over all
rounds, and in each.

Run: python tests/benchmarks/step_records.py [--gpus 2] [--rounds 3] [--steps 30] [--megabytes 100] [--milliseconds 100]
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

    def __init__(self, megabytes: float, work: int, records: bool) -> None:
        super().__init__()
        count = max(1, round(megabytes / 2))
        size = round(megabytes * 2**20 / 8 / count)
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(size)) for _ in range(count)])
        self.work, self.records = work, records
        self.times: list[float] = []

    def setup(self, stage: str) -> None:
        from raytrainer.worker import worker

        self.__dict__["made"] = worker.begin_records
        if not self.records:
            worker.begin_records = lambda *args: None

    def teardown(self, stage: str) -> None:
        from raytrainer.worker import worker

        worker.begin_records = self.__dict__.pop("made")

    def multiplied(self, batch: Any, work: int) -> Any:
        other = batch
        with torch.no_grad():
            for _ in range(work):
                other = (batch @ other).tanh()
        return other

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = sum(part.mean() for part in self.parts) + self.multiplied(batch, self.work).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class Clock(raytrainer.WorkerCallback):
    """Times each step, a GPU's by its own clock; how many matrices take so many milliseconds."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.moments: list[Any] = []
        self.gpu = module.device.type == "cuda"
        if module.work == 0:
            batch = torch.randn(SIDE[self.gpu], SIDE[self.gpu], device=module.device)
            for _ in range(2):
                began = self.moment()
                module.multiplied(batch, 50)
                module.work = max(1, round(50 * self.milliseconds / self.between(began, self.moment())))

    def moment(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, one: Any, other: Any) -> float:
        if not self.gpu:
            return 1e3 * float(other - one)
        other.synchronize()
        return float(one.elapsed_time(other))

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.moments.append(self.moment())

    def on_train_end(self, trainer: Any, module: Any) -> None:
        module.times = [self.between(*pair) for pair in itertools.pairwise(self.moments[3:])]
        self.moments = []


#: Of the matrices: on CPUs, and on GPUs.
SIDE = (512, 4096)


def fitted(arguments: argparse.Namespace, steps: int, work: int, every: int | None, records: bool) -> Model:
    model, gpus = Model(arguments.megabytes, work, records), arguments.gpus
    workers: dict[str, Any] = {"gpus": gpus} if gpus else {"num_processes": 2}
    trainer = raytrainer.Trainer(
        strategy="ddp", max_steps=steps, max_epochs=-1, snapshot_every=every, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, spares=0, callbacks=Clock(arguments.milliseconds),
        **workers,
    )  # fmt: skip
    side = SIDE[bool(gpus)]
    trainer.fit(model, [torch.randn(side, side)] * 100)
    return model


SIDES: dict[str, tuple[int | None, bool]] = {
    "no snapshots": (None, False),
    "the state copied after each step": (1, False),
    "each step recorded": (1, True),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--milliseconds", type=float, default=100)
    arguments = parser.parse_args()
    began = time.time()
    work = fitted(arguments, 2, 0, None, False).work
    times: dict[str, list[list[float]]] = {name: [] for name in SIDES}
    for _ in range(arguments.rounds):
        for name, side in SIDES.items():
            times[name].append(fitted(arguments, arguments.steps, work, *side).times)
            print(
                f"{name:34} {statistics.median(times[name][-1]):7.2f} ms, after {time.time() - began:.0f} s", flush=True
            )
    without = times["no snapshots"]
    for name, rounds in times.items():
        own = statistics.median(itertools.chain(*rounds))
        ratio = own / statistics.median(itertools.chain(*without))
        pairs = [statistics.median(one) / statistics.median(other) for one, other in zip(rounds, without, strict=True)]
        each = ", ".join(f"{pair:.3f}" for pair in pairs)
        mean = statistics.fmean(itertools.chain(*rounds))
        print(f"{name:34} median {own:7.2f} ms a step, mean {mean:7.2f}; ratio {ratio:.3f}, round by round {each}")
    print(f"{time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main()
