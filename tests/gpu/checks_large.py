"""A module that is whole in no process: made, trained, saved and gone on with; what the driver takes meanwhile."""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml
import torch
from harness import Skipped, check, fit

import raytrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import llama

#: Bytes that the driver may take above its start.
MOST = 2**30


class Held:
    """Bytes of this process's own memory: now, and at most since then."""

    def __init__(self) -> None:
        self.begun = self.most = self.now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, self.now())

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()


class Large(llama.Llama):
    """The example's, without a state in its optimizer, so that a checkpoint fits on the disk."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.print(f"step {self.global_step}: loss {float(outputs['loss']):.4f}")


def eight_billion_are_never_whole(size: str = "8B", length: int = 512, gpus: int | None = 1) -> str:
    shape = llama.SIZES[size]
    rows = torch.randint(shape.vocabulary, (4, length + 1), generator=torch.Generator().manual_seed(0))
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=1)
    folder, took = tempfile.mkdtemp(), []
    held = Held()
    with held.watched():
        for steps, ckpt_path in ((2, None), (4, f"{folder}/last.ckpt")):
            module = raytrainer.on_meta(lambda: Large(size, length))
            saver = raytrainer.ModelCheckpoint(folder, save_last=True, save_top_k=0) if ckpt_path is None else None
            begun = time.perf_counter()
            trainer = fit(
                module, loader, strategy="fsdp", gpus=gpus, num_processes=None if gpus else 1, max_epochs=None,
                max_steps=steps, precision="bf16-mixed", callbacks=saver, enable_checkpointing=saver is not None,
                ckpt_path=ckpt_path, snapshot_every=None,
            )  # fmt: skip
            took.append(time.perf_counter() - begun)
            assert trainer.global_step == steps
    count = sum(p.numel() for p in module.parameters())
    written = sum(path.stat().st_size for path in Path(folder, "last.ckpt").rglob("*") if path.is_file())
    shutil.rmtree(folder)
    above = held.most - held.begun
    assert all(p.is_meta for p in module.parameters())
    assert written > 4 * count and above < MOST, (written, count, above)
    return (
        f"{count / 1e9:.2f}B parameters made, trained and saved ({written / 2**30:.1f} GiB) in {took[0]:.0f} s, "
        f"gone on with in {took[1]:.0f} s; the driver took {above / 2**20:.0f} MiB above its start"
    )


@check(1)
def a_model_that_is_whole_nowhere() -> str:
    free = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).free
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    if free < 100 * 2**30 or disk < 40 * 2**30:
        raise Skipped("needs 100 GiB of a GPU, and 40 GiB of disk")
    return eight_billion_are_never_whole()
