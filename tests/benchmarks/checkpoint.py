"""How long a save blocks training: 400 MB of state on the CPU, and on a GPU if there is one.

Beside it: a bare copy into buffers that are used again, `torch.distributed.checkpoint.async_save` (default and with a
kept `DefaultStager`), `torch.save`, and Lightning's `save_checkpoint` (if installed). Then: how much slower steps are
while the write goes on. Before all that: what checksums cost, of writing to the disk and of reading.

Run: python tests/benchmarks/checkpoint.py [--rounds 5] [--megabytes 400] [--devices cpu cuda]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from timing import interleaved, table
from torch import nn
from torch.utils.data import DataLoader

import raytrainer
from raytrainer.checkpointing import checkpoint_files, running_checksum
from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint


class Model(raytrainer.Module):
    """`megabytes` of parameters in 16 tensors, and a step that uses few of them."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        each = megabytes * 2**20 // 4 // 16
        self.blocks = nn.ParameterList(nn.Parameter(torch.randn(each), requires_grad=False) for _ in range(16))
        self.head = nn.Linear(256, 256)
        self.moments: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.moments.append(time.perf_counter())
        for _ in range(20):
            batch = self.head(batch).tanh()
        return batch.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=1e-3)


class SaveEvery(raytrainer.Callback):
    """Saves at every n-th step; keeps how long each call took."""

    def __init__(self, folder: str, every: int) -> None:
        self.folder, self.every_n_train_steps = folder, every
        self.seconds: list[float] = []

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        if trainer.global_step % (self.every_n_train_steps or 1) == 0:
            begun = time.perf_counter()
            trainer.save_checkpoint(f"{self.folder}/ours.ckpt")
            self.seconds.append(time.perf_counter() - begun)


def train(
    model: Model, steps: int, folder: str, every: int, device: torch.device, strategy: str = "local"
) -> SaveEvery:
    callback = SaveEvery(folder, every)
    trainer = raytrainer.Trainer(
        max_steps=steps, strategy=strategy, gpus=1 if device.type == "cuda" else None, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callback,
    )  # fmt: skip
    data = [torch.randn(64, 256) for _ in range(64)]
    trainer.fit(model, data)
    return callback


def blocked(megabytes: int, folder: str, device: torch.device, strategy: str) -> float:
    """The median of saves after the first, which allocates the buffers; each when the one before has been written."""
    every = 300 if device.type == "cpu" else 500
    return statistics.median(train(Model(megabytes), 6 * every, folder, every, device, strategy).seconds[2:])


def bare_copy(model: Model, buffers: dict[str, torch.Tensor]) -> float:
    begun = time.perf_counter()
    for name, tensor in model.state_dict().items():
        if name not in buffers:
            buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        buffers[name].copy_(tensor, non_blocking=True)
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def async_save(model: Model, folder: str, stager: Any) -> float:
    begun = time.perf_counter()
    options = {"async_stager": stager} if stager is not None else {}
    response: Any = dcp.async_save(dict(model.state_dict()), checkpoint_id=f"{folder}/dcp", **options)
    staged = getattr(response, "staging_completion", None)
    if staged is not None:
        staged.result()
    seconds = time.perf_counter() - begun
    (response.upload_completion if hasattr(response, "upload_completion") else response).result()
    return seconds


def kept_stager(model: Model, folder: str, device: torch.device) -> Any:
    """A stager that has its buffers; None where torch has none, or one that fails (as 2.11's does when used again)."""
    try:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        on_gpu = device.type == "cuda"
        stager = DefaultStager(StagingOptions(on_gpu, True, on_gpu, on_gpu))
        for _ in range(2):
            async_save(model, folder, stager)
    except Exception as error:
        print(f"no DCP with a kept stager: {error!r}", flush=True)
        return None
    return stager


def torch_save(model: Model, folder: str) -> float:
    begun = time.perf_counter()
    torch.save(model.state_dict(), f"{folder}/plain.pt")
    return time.perf_counter() - begun


def lightning_save(model: Model, folder: str) -> float:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Wrapped(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model.head(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.head.parameters(), lr=1e-3)

    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Wrapped(), DataLoader(torch.randn(64, 256), batch_size=64))
    begun = time.perf_counter()
    trainer.save_checkpoint(f"{folder}/lightning.ckpt")
    return time.perf_counter() - begun


def write(path: str, state: dict[str, Any], hashes: bool) -> float:
    """Seconds until a checkpoint is on the disk, without its checksums if so told."""
    begun = time.perf_counter()
    with contextlib.nullcontext() if hashes else no_hashes():
        write_checkpoint(path, state)
    return time.perf_counter() - begun


def write_plainly(path: str, state: dict[str, Any]) -> float:
    """Seconds until `torch.save` has it on the disk."""
    begun = time.perf_counter()
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begun


def read(path: str, how: Callable[[str], object]) -> tuple[float, float]:
    """Seconds to read one from the disk, and of them the processor's; in a process of its own, as who resumes does:
    memory that a process has had before comes sooner."""
    for file in os.scandir(path) if os.path.isdir(path) else [path]:
        opened = os.open(file, os.O_RDONLY)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)
    end, other = os.pipe()
    if not (process := os.fork()):
        begun, worked = time.perf_counter(), time.process_time()
        try:
            how(path)
            os.write(other, json.dumps([time.perf_counter() - begun, time.process_time() - worked]).encode())
        finally:
            os._exit(0)
    os.close(other)
    with open(end, "rb") as answer:
        took = json.loads(answer.read())
    os.waitpid(process, 0)
    return took[0], took[1]


def read_unchecked(path: str) -> None:
    """Without looking at its checksums."""
    with unittest.mock.patch.object(checkpoint_files, "CheckedReader", lambda file, *about: file):
        read_checkpoint(path)


@contextlib.contextmanager
def no_hashes() -> Iterator[None]:
    """Nothing is hashed."""
    with unittest.mock.patch.object(running_checksum.xxhash, "xxh3_128", NoHash):
        yield


class NoHash:
    def __init__(self, data: Any = b"") -> None:
        pass

    def update(self, data: Any) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 32


def checksum_costs(megabytes: int, folder: str, rounds: int) -> None:
    state, path = {"state_dict": dict(Model(megabytes).state_dict())}, f"{folder}/summed.ckpt"
    written = interleaved(
        {
            "without": lambda: write(f"{path}-", state, False),
            "with": lambda: write(path, state, True),
            "torch.save and fsync": lambda: write_plainly(f"{folder}/plain.pt", state),
        },
        rounds,
    )
    ways: dict[str, tuple[str, Callable[[str], object]]] = {
        "without": (path, read_unchecked),
        "with": (path, read_checkpoint),
        "torch.load": (f"{folder}/plain.pt", lambda path: torch.load(path, weights_only=True)),
    }
    worked: dict[str, list[float]] = {name: [] for name in ways}

    def read_by(name: str) -> float:
        took, processor = read(*ways[name])
        worked[name].append(processor)
        return took

    found = interleaved({name: lambda name=name: read_by(name) for name in ways}, rounds)  # type: ignore[misc]
    one_pass = interleaved({"hash": lambda: hash_in_memory(state)}, rounds)["hash"]
    for name, sides in (("Writing", written), ("Reading", found), ("Processor's time of reading", worked)):
        print(f"\n{name} {megabytes} MB, checksums\n\n{table(sides, 'without', 'ms', 1e3)}")
        ratio = statistics.median(sides["with"]) / statistics.median(sides["without"])
        print(f"\nMedians: {ratio:.3f} of the time without.")
    print(f"\nHashing alone, in memory: {statistics.median(one_pass) * 1e3:.0f} ms.\n", flush=True)


def hash_in_memory(state: dict[str, Any]) -> float:
    begun = time.perf_counter()
    for tensor in state["state_dict"].values():
        running_checksum.xxhash.xxh3_128(tensor.view(-1).view(torch.uint8).numpy().data)
    return time.perf_counter() - begun


def slowdown(megabytes: int, folder: str, device: torch.device, strategy: str) -> float:
    """Median time between steps while a write goes on, over that without any."""
    calm, busy = Model(megabytes), Model(megabytes)
    train(calm, 1500, folder, 10**9, device, strategy)
    train(busy, 1500, folder, 50, device, strategy)
    gaps = [
        statistics.median(b - a for a, b in zip(m.moments[200:], m.moments[201:], strict=False)) for m in (busy, calm)
    ]
    return gaps[0] / gaps[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3, help="runs with and without writing, for the slow-down")
    parser.add_argument("--checksums", action="store_true", help="what these cost, and nothing else")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--devices", nargs="+", default=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checksum_costs(arguments.megabytes, folder, 4 * arguments.rounds)
    if arguments.checksums:
        return
    for device in map(torch.device, arguments.devices):
        folder = tempfile.mkdtemp()
        model = Model(arguments.megabytes).to(device)
        buffers: dict[str, torch.Tensor] = {}
        bare_copy(model, buffers)
        sides: dict[str, Callable[[], float]] = {
            "bare copy into kept buffers": lambda m=model, b=buffers: bare_copy(m, b),
            "raytrainer": lambda f=folder, d=device: blocked(arguments.megabytes, f, d, "local"),
            "raytrainer, Ray worker": lambda f=folder, d=device: blocked(arguments.megabytes, f, d, "ddp"),
            "torch.save": lambda m=model, f=folder: torch_save(m, f),
        }
        if importlib.util.find_spec("lightning") and device.type == "cpu":
            sides["Lightning save_checkpoint"] = lambda m=model, f=folder: lightning_save(m, f)
        kept = kept_stager(model, folder, device)
        if kept is not None:
            sides["DCP async_save, kept stager"] = lambda m=model, f=folder, s=kept: async_save(m, f, s)
        sides["DCP async_save"] = lambda m=model, f=folder: async_save(m, f, None)
        figures = interleaved(sides, arguments.rounds)
        print(f"\n{arguments.megabytes} MB on {device}: time that training is blocked\n")
        print(table(figures, "bare copy into kept buffers", "ms", 1e3))
        for strategy in ("local", "ddp"):
            ratios = [slowdown(arguments.megabytes, folder, device, strategy) for _ in range(arguments.pairs)]
            print(f"\nSteps while a write goes on ({strategy}): {statistics.median(ratios):.2f} of the usual time.")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
