"""Rows a second into two workers from Parquet files of float32 vectors, and seconds to an epoch's first batch.

Sides: raytrainer with the blocks kept in memory (shuffled, and in order) and executed anew in each epoch; bare
`streaming_split` + `iter_torch_batches` in two actors, over the files and over a materialised dataset (neither
shuffles); a DataLoader with two processes over the same vectors, shuffled. Figures are of the second epoch on;
raytrainer's have its whole training loop in them, with a step that does nothing. Sides take turns in `--rounds` rounds.

Run: python tests/benchmarks/ray_data.py [--rows 1000000] [--batch-size 1024] [--rounds 3]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from timing import interleaved
from torch.utils.data import DataLoader, Dataset

DIM = 256
EPOCHS = 3
WORKERS = 2

Figures = dict[str, tuple[float, float]]


def write(folder: str, rows: int, files: int = 8) -> None:
    generator = np.random.default_rng(0)
    for i in range(files):
        values = generator.standard_normal((rows // files, DIM), dtype=np.float32)
        table = pa.table({"x": pa.FixedSizeListArray.from_arrays(values.reshape(-1), DIM)})
        pa.parquet.write_table(table, f"{folder}/{i}.parquet", row_group_size=10_000, compression="none")


def timed(batches: Iterable[Any]) -> tuple[float, float, int]:
    """Seconds to the first batch, seconds in all, rows."""
    begun, first, rows = time.perf_counter(), 0.0, 0
    for batch in batches:
        first = first or time.perf_counter() - begun
        rows += len(batch["x"])
    return first, time.perf_counter() - begun, rows


def summed(by_worker: list[list[tuple[float, float, int]]]) -> tuple[float, float]:
    """(seconds to the first batch, rows a second of all workers): medians over epochs but the first."""
    firsts, rates = [], []
    for epoch in list(zip(*by_worker, strict=True))[1:]:
        firsts.append(max(first for first, _, _ in epoch))
        rates.append(sum(rows for _, _, rows in epoch) / max(seconds for _, seconds, _ in epoch))
    return statistics.median(firsts), statistics.median(rates)


def ours(dataset: Any, batch_size: int, folder: str, **options: Any) -> tuple[float, float]:
    import raytrainer

    class Count(raytrainer.Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.epochs: list[tuple[float, float, int]] = []

        def on_train_epoch_start(self) -> None:
            self.begun, self.first, self.rows = time.perf_counter(), 0.0, 0

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.last = time.perf_counter()
            self.first = self.first or self.last - self.begun
            self.rows += len(batch["x"])

        def on_train_epoch_end(self) -> None:
            self.epochs.append((self.first, self.last - self.begun, self.rows))

        def on_train_end(self) -> None:
            torch.save(self.epochs, f"{folder}/{self.global_rank}.pt")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = raytrainer.Trainer(
        strategy="ddp", num_processes=WORKERS, max_epochs=EPOCHS, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, max_failures=0,
    )  # fmt: skip
    trainer.fit(Count(), raytrainer.RayDataset(dataset, batch_size=batch_size, **options))
    return summed([torch.load(f"{folder}/{rank}.pt") for rank in range(WORKERS)])


def bare(dataset: Any, batch_size: int) -> tuple[float, float]:
    import ray

    import raytrainer

    raytrainer.Trainer(logger=False).close()  # its idle workers' CPUs

    def consume(shard: Any) -> list[tuple[float, float, int]]:
        return [timed(shard.iter_torch_batches(batch_size=batch_size)) for _ in range(EPOCHS)]

    shards = dataset.streaming_split(WORKERS, equal=True)
    task = ray.remote(num_cpus=1)(consume)
    return summed(ray.get([task.remote(shard) for shard in shards]))


class Vectors(Dataset[Any]):
    def __init__(self, folder: str) -> None:
        table = pa.parquet.read_table(folder).combine_chunks()
        column = table.column("x").chunk(0)
        self.values = torch.from_numpy(column.flatten().to_numpy().reshape(-1, DIM).copy())

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.values[index]}


def loader(folder: str, batch_size: int) -> tuple[float, float]:
    batches = DataLoader(Vectors(folder), batch_size=batch_size, shuffle=True, num_workers=2, persistent_workers=True)
    return summed([[timed(batches) for _ in range(2)]])


def main() -> None:
    import ray
    import ray.data

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    size = arguments.batch_size
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    firsts: dict[str, list[float]] = {}

    def side(name: str, run: Any) -> Any:
        def measure() -> float:
            first, rate = run()
            firsts.setdefault(name, []).append(first)
            return rate

        return measure

    with tempfile.TemporaryDirectory() as folder:
        write(folder, arguments.rows)
        files = ray.data.read_parquet(f"{folder}/")
        with tempfile.TemporaryDirectory() as notes:
            runs = {
                "bare, files": lambda: bare(files, size),
                "bare, materialised": lambda: bare(files.materialize(), size),
                "raytrainer, kept, shuffled": lambda: ours(files, size, notes, shuffle=True, keep_in_memory=True),
                "raytrainer, kept, in order": lambda: ours(files, size, notes, keep_in_memory=True),
                "raytrainer, streamed": lambda: ours(files, size, notes, keep_in_memory=False),
                "DataLoader, 2 processes": lambda: loader(folder, size),
            }
            rates = interleaved({name: side(name, run) for name, run in runs.items()}, arguments.rounds)
    print(
        f"{arguments.rows} rows of {DIM} float32, batches of {size}, {WORKERS} workers, {arguments.rounds} round(s)\n"
    )
    print("| | rows/s | of bare, files | of bare, materialised | first batch of an epoch, s |\n|---|---|---|---|---|")
    for name, values in rates.items():
        against = [
            statistics.median(value / base for value, base in zip(values, rates[other], strict=True))
            for other in ("bare, files", "bare, materialised")
        ]
        first = statistics.median(firsts[name])
        print(f"| {name} | {statistics.median(values):,.0f} | {against[0]:.2f} | {against[1]:.2f} | {first:.3f} |")
    ray.shutdown()


if __name__ == "__main__":
    main()
