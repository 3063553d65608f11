"""What the driver needs a chunk, and what it keeps, with up to a thousand workers.

Workers are simulated: they report as real ones do, with other numbers on each rank and in each chunk, and compute
nothing. All that the driver does with the reports is real: coordinator, merging, metrics, loggers, progress, decisions.
"Reading" is what it takes to unpickle the reports, as Ray does when answers are fetched. With `--ray 64` it also asks
that many idle actors, without torch, through the same code that asks workers, and in turn with it by Ray alone.

    python tests/benchmarks/driver_scale.py [--workers 1 8 64 256 1000] [--chunks 100 10000] [--ray 64] [--plot FILE]
"""

from __future__ import annotations

import argparse
import gc
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timing import interleaved

import raytrainer as rt
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.driver.workers.worker_group import Copies, Room
from raytrainer.errors import WorkerLostError
from raytrainer.messages import (
    EvaluationReport,
    EvaluationStart,
    Fingerprints,
    FinishReport,
    SetupReport,
    TrainReport,
    TrainStart,
)
from raytrainer.metric_messages import MetricReport, MetricSpec, Partial, StepRow
from raytrainer.plan.recoveries import Continuity

#: Batches of a chunk, and of an epoch; a validation follows each epoch.
CHUNK, EPOCH = 100, 2000

#: Metrics that each step logs, of which half are reduced over workers at each row.
NAMES = tuple(f"metric_{i}" for i in range(6))

#: A row is logged each so many steps.
EVERY = 50

SPECS = {
    name: MetricSpec(name, True, True, index == 0, True, sync_dist=index % 2 == 0, reduce="mean")
    for index, name in enumerate(NAMES)
}


WEIGHTS = {f"layer.{name}": value for name, value in torch.nn.Linear(1, 1).state_dict().items()}


class Simulated:
    """A group whose workers do nothing and say what workers say.

    Args:
        size: How many.
    """

    in_process = False
    continuity = Continuity()

    def __init__(self, size: int) -> None:
        self.size, self.broken, self.epoch, self.batch, self.step = size, False, 0, 0, 0
        self.inside = 0.0  # seconds in here, which are the workers' own
        self.answered: Callable[[], None] = lambda: None
        self.lose_at = -1
        self.evaluated = False
        self.chunks = [self._report() for _ in range(size)]
        self.by_node = {f"node{i}": min(8, size - 8 * i) for i in range((size + 7) // 8)}

    def _report(self) -> TrainReport:
        return TrainReport(CHUNK, 0, 0, 1.0, False, False, 0.01, MetricReport(specs=SPECS), steps=CHUNK)

    def describe(self) -> str:
        return f"{self.size} simulated workers"

    def setup(self, task: Any) -> list[SetupReport]:
        return [SetupReport(rank, has_validation=True, parts=self.size) for rank in range(self.size)]

    def call(self, method: Any, /, *args: Any, **kwargs: Any) -> list[Any]:
        began = time.perf_counter()
        try:
            answer = getattr(self, f"_{method.__name__}", None)
            return [None] * self.size if answer is None else answer(*args, **kwargs)
        finally:
            self.inside += time.perf_counter() - began

    def _start_training(self) -> list[TrainStart]:
        return [TrainStart(EPOCH, 8, [1]) for _ in range(self.size)]

    def _start_epoch(self, epoch: int, batch: int, *rest: Any) -> list[TrainStart]:
        self.epoch, self.batch = epoch, batch
        return self._start_training()

    def _train(self, batches: int, *rest: Any) -> list[TrainReport]:
        self.answered()
        if 0 <= self.lose_at <= self.step:
            self.lose_at = -1
            raise WorkerLostError(self.size - 1, "simulated")
        rows = [s for s in range(self.step, self.step + batches) if (s + 1) % EVERY == 0]
        self.batch, self.step = self.batch + batches, self.step + batches
        for rank, report in enumerate(self.chunks):
            report.batches = report.steps = batches
            report.seconds = batches / CHUNK
            report.batch, report.step = self.batch, self.step
            value = self.step + rank / 7
            by_row = dict.fromkeys([SPECS[name].step_name for name in NAMES], value)
            logged = [StepRow(s, self.epoch, by_row) for s in rows]
            report.metrics = MetricReport(SPECS, logged, dict.fromkeys(NAMES, value))
            if rank:
                report.metrics = report.metrics.shared()
        return list(self.chunks)

    def _epoch_metrics(self) -> list[MetricReport]:
        return [
            MetricReport(SPECS, epoch={name: Partial(self.step + rank / 7, 8.0) for name in NAMES})
            for rank in range(self.size)
        ]

    def _end_batches(self, *args: Any) -> list[MetricReport]:
        return [replace(report, trained=True) for report in self._epoch_metrics()]

    def _end_epoch(self, *args: Any) -> list[MetricReport]:
        return [MetricReport(trained=True) for _ in range(self.size)]

    def _start_evaluation(self, *args: Any) -> list[EvaluationStart]:
        return [EvaluationStart([1]) for _ in range(self.size)]

    def _evaluate(self, *args: Any) -> list[EvaluationReport]:
        return [EvaluationReport("validate", 1, 0.1, True, m, by_loader=[1]) for m in self._epoch_metrics()]

    def _end_evaluation(self, *args: Any) -> list[MetricReport]:
        return [MetricReport() for _ in range(self.size)]

    def _end_evaluation_epoch(self, *args: Any) -> list[EvaluationReport]:
        return [EvaluationReport("validate", 1, 0.0, True, MetricReport(), by_loader=[1]) for _ in range(self.size)]

    def _finish(self, *args: Any) -> list[FinishReport]:
        return [FinishReport(state_dict=WEIGHTS, buffers={}) for _ in range(self.size)]

    def room(self, weights_only: bool) -> Room:
        return Room()

    def capture(self, weights_only: bool = False, final: bool = False) -> Copies:
        step, size = self.step, self.size
        states = [
            {"own": {"rng": rank}, **({"state_dict": {}, "global_step": step, "epoch": 0} if rank < 2 else {})}
            for rank in range(size)
        ]
        return Copies(lambda: (states, None))

    def _fingerprints(self, *args: Any, **kwargs: Any) -> list[Fingerprints]:
        return [Fingerprints({"layer.weight": 1}, {}) for _ in range(self.size)]

    def _restore(self, checkpoint: dict[str, Any]) -> list[SetupReport]:
        self.step = checkpoint["progress"]["step"]
        return self.setup(None)

    def whereabouts(self, patience: float) -> list[Any]:
        return []

    def call_off(self) -> None:
        pass

    def abort(self) -> None:
        self.broken = True

    def mended(self) -> None:
        """All workers start anew."""

    def recorded(self, chunks: Collection[int]) -> None:
        """Nothing."""

    def keep_spares(self, count: int) -> None:
        """There are none."""

    def release(self) -> None:
        pass


class Module(rt.Module):
    """What the driver has of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        raise NotImplementedError


class Stopwatch(rt.Callback):
    """Milliseconds of the driver's own in each chunk, those without an epoch's end; memory after some of them.

    Args:
        group: The simulated workers.
        looks: Chunks after which to look at memory.
    """

    def __init__(self, group: Simulated, looks: list[int]) -> None:
        self.group, self.looks, self.chunks, self.mebibytes = group, looks, 0, dict[int, float]()
        self.plain: list[float] = []
        self.ends: list[float] = []
        self._before: tuple[float, float] | None = None
        group.answered = self.next_chunk

    def next_chunk(self) -> None:
        """Called as workers are told to train."""
        now = time.perf_counter(), self.group.inside
        if self._before is not None:
            own = 1e3 * (now[0] - self._before[0] - (now[1] - self._before[1]))
            (self.ends if self.group.batch == 0 else self.plain).append(own)
        self._before = now
        self.chunks += 1
        if self.chunks in self.looks:
            gc.collect()
            self.mebibytes[self.chunks] = resident()
            self._before = None


def resident() -> float:
    """Memory of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(workers: int, looks: list[int], lose: bool = False) -> tuple[Stopwatch, rt.Trainer]:
    """A fit of so many chunks."""
    group = Simulated(workers)
    group.lose_at = EPOCH // 2 if lose else -1
    GroupSupply.prepare = GroupSupply.give_back = lambda *args: None  # type: ignore[assignment]
    GroupSupply.leaving = lambda *args: {}  # type: ignore[assignment]
    GroupSupply.take = lambda *args: group  # type: ignore[assignment,return-value]
    watch = Stopwatch(group, looks)
    with tempfile.TemporaryDirectory() as folder:
        trainer = rt.Trainer(
            strategy="ddp", num_processes=workers, max_steps=CHUNK * max(looks), num_sanity_val_steps=0,
            default_root_dir=folder, callbacks=[watch], enable_model_summary=False, enable_checkpointing=False,
            check_val_every_n_epoch=1,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(torch.zeros(8, 1))
        trainer.fit(Module(), loader, loader)
    return watch, trainer


def reading(workers: int) -> float:
    """Milliseconds to unpickle a chunk's reports."""
    group = Simulated(workers)
    pickled = [pickle.dumps(report, 5) for report in group._train(CHUNK)]
    times = []
    for _ in range(20):
        began = time.perf_counter()
        for report in pickled:
            pickle.loads(report)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


@dataclass
class Trip:
    """From telling idle actors a verb until all answers are there: medians, in milliseconds.

    Attributes:
        ours: By the code that asks workers.
        bare: By Ray alone, in turn with it: the same bytes to each, and one `ray.get`.
        put: Likewise, of bytes that are put into Ray's store once.
        ratio: Of ours to bare, median of the rounds'.
        processor: Of the driver's process: ours, bare and put.
    """

    workers: int
    ours: float
    bare: float
    put: float
    ratio: float
    processor: list[float]


def asked_over_ray(workers: int, rounds: int = 40) -> Trip:
    """So many actors, all of which share this machine's processors."""
    import ray

    from raytrainer.driver.workers.ray_answers import Answers
    from raytrainer.driver.workers.task_pickling import asked
    from raytrainer.worker.verbs import verb_of
    from raytrainer.worker.worker import Worker

    class Asked:
        def __init__(self) -> None:
            self.places: list[Any] = []
            self.outputs: list[str | None] = []
            self.stale = False

        def lose(self, ranks: Collection[int] = ()) -> None:
            raise SystemExit("an actor was lost")

        def whereabouts(self, patience: float) -> list[Any]:
            return []

    @ray.remote(num_cpus=0)
    class Idle:
        def obey_packed(self, packed: bytes) -> bytes:
            return packed

        def obey(self, *told: Any) -> Any:
            return told

    actors = [Idle.remote() for _ in range(workers)]
    arguments = CHUNK, None, None, True, 1, 4
    packed = pickle.dumps([("train", arguments, {})], 5)
    answers = Answers(Asked())

    def ours() -> None:
        answers.all(asked(actors, (), verb_of(Worker.train), arguments, {}), 600.0, "nothing")

    def bare() -> None:
        ray.get([actor.obey_packed.remote(packed) for actor in actors])

    def put() -> None:
        sent = ray.put(packed)
        ray.get([actor.obey_packed.remote(sent) for actor in actors])

    processor: dict[str, list[float]] = {}

    def timed(name: str, side: Callable[[], None]) -> Callable[[], float]:
        def one() -> float:
            began, used = time.perf_counter(), time.process_time()
            side()
            processor.setdefault(name, []).append(1e3 * (time.process_time() - used))
            return 1e3 * (time.perf_counter() - began)

        return one

    sides = {side.__name__: timed(side.__name__, side) for side in (ours, bare, put)}
    interleaved(sides, 5)
    processor.clear()
    found = interleaved(sides, rounds)
    for actor in actors:
        ray.kill(actor)
    ratio = statistics.median(a / b for a, b in zip(found["ours"], found["bare"], strict=True))
    middle = {name: statistics.median(times) for name, times in found.items()}
    return Trip(workers, **middle, ratio=ratio, processor=[statistics.median(processor[name]) for name in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64, 256, 1000])
    parser.add_argument("--chunks", type=int, nargs="+", default=[100, 10000], help="of the largest: looks at memory")
    parser.add_argument("--ray", type=int, nargs="*", default=[])
    parser.add_argument("--plot", help="a file to draw the curve into")
    options = parser.parse_args()
    table = []
    print(
        "| workers | ms a chunk | ms at an epoch's end, with a validation | ms reading the reports |\n|---|---|---|---|"
    )
    for workers in options.workers:
        watch, _ = run(workers, [200])  # with nine epochs' ends
        row = workers, statistics.median(watch.plain), statistics.median(watch.ends), reading(workers)
        table.append(row)
        print(f"| {row[0]:,} | {row[1]:.2f} | {row[2]:.2f} | {row[3]:.2f} |", flush=True)
    most = max(options.workers)
    watch, _ = run(most, options.chunks)
    for chunks, mebibytes in watch.mebibytes.items():
        print(f"{most:,} workers: {mebibytes:.1f} MiB after {chunks:,} chunks")
    watch, trainer = run(most, [100], lose=True)
    (recovery,) = trainer.recoveries
    print(f"{most:,} workers, one lost: {1e3 * recovery.seconds:.1f} ms of the driver's own until training goes on")
    trips = [asked_over_ray(workers) for workers in options.ray]
    if trips:
        print(
            "\n| idle actors | ms from telling to answers | bare Ray | ratio | bare Ray, with ray.put | "
            "ms of processor in the driver | bare Ray | with ray.put |\n|---|---|---|---|---|---|---|---|"
        )
    for trip in trips:
        used = " | ".join(f"{each:.2f}" for each in trip.processor)
        print(f"| {trip.workers} | {trip.ours:.2f} | {trip.bare:.2f} | {trip.ratio:.2f} | {trip.put:.2f} | {used} |")
    if options.plot:
        draw(options.plot, table, trips)


def draw(path: str, table: list[tuple[int, float, float, float]], trips: list[Trip]) -> None:
    """The table as a figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    workers = [row[0] for row in table]
    for column, label in ((1, "a chunk"), (2, "an epoch's end, with a validation"), (3, "reading reports")):
        axes.plot(workers, [row[column] for row in table], "o-", label=label)
    asked = [trip.workers for trip in trips]
    if trips:
        axes.plot(asked, [trip.ours for trip in trips], "s--", label="telling idle actors, and their answers")
        axes.plot(asked, [trip.bare for trip in trips], "x:", label="the same by bare Ray")
    axes.axhline(20, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="ms of the driver")
    axes.set_xticks(workers, [f"{each:,}" for each in workers])
    axes.set_yticks([0.01, 0.1, 1, 10, 20, 100], ["0.01", "0.1", "1", "10", "20", "100"])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=7.5, loc="lower right")
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
