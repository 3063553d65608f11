"""Scripts as users run them, and what a terminal does to them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ray_models import PATIENCE, alive, eventually

MODULE = """
import os, sys, time
import torch
from torch.utils.data import DataLoader
import raytrainer

HALF = 0.5

def scaled(loss):
    return loss * HALF

class Net(raytrainer.Module):
    def __init__(self, pause=0.0):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)
        self.batches = 0
        self.pids = []

    def training_step(self, batch, batch_idx):
        if not self.pids:
            self.pids = [int(pid) for pid in self.all_gather(os.getpid())]
            self.print("pids", *self.pids, "in all", flush=True)
            self.print("pausing" if self.hparams.pause else "running", flush=True)
        time.sleep(self.hparams.pause)
        self.batches += 1
        return scaled(self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def loader(batches=4):
    return DataLoader(torch.ones(4 * batches, 2), batch_size=2)

def trainer(**options):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return raytrainer.Trainer(strategy="ddp", num_processes=2, **{**quiet, "max_epochs": 1, **options})
"""

INTERRUPTED = (
    MODULE
    + """
if __name__ == "__main__":
    long = loader(batches=2000)
    module = Net(pause=0.02)
    first = trainer(max_epochs=100)
    before = module.layer.weight.clone()
    first.fit(module, long)
    assert first.interrupted and first.state.status == "interrupted", first.state
    assert 0 < first.global_step == module.batches < 2000, (first.global_step, module.batches)
    assert not torch.equal(before, module.layer.weight)
    print("stopped", flush=True)

    module = Net()
    again = trainer()
    again.fit(module, loader())
    assert not again.interrupted and again.global_step == 4
    print("fitted", flush=True)

    try:
        trainer(max_epochs=100).fit(Net(pause=600.0), long)
    except KeyboardInterrupt:
        print("aborted", flush=True)
    print("goes on", flush=True)
"""
)


def printed_pids(output: str) -> set[int]:
    """The workers' processes, as a script has printed them. Another line may begin before theirs has ended."""
    return {int(pid) for pids in re.findall(r"pids ([\d ]+) in all", output) for pid in pids.split()}


class Script:
    """A script in a process group of its own, as a terminal's foreground job, and the lines it has printed."""

    def __init__(self, path: Path, *arguments: str, **environment: str) -> None:
        self.output = path.with_suffix(".out")
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, path, *arguments], stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "RAY_DEDUP_LOGS": "0", **environment},
            )  # fmt: skip

    def lines(self, word: str) -> list[str]:
        return [line for line in self.output.read_text().splitlines() if word in line]

    def wait_for(self, word: str, times: int = 1) -> None:
        def there() -> bool:
            return len(self.lines(word)) >= times or self.process.poll() is not None

        eventually(there, lambda: f"{word!r} in:\n{self.output.read_text()}")
        assert len(self.lines(word)) >= times, self.output.read_text()

    def control_c(self) -> None:
        """What a terminal does: SIGINT to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def pids(self) -> set[int]:
        """The workers' processes, as the script has printed them."""
        return printed_pids(self.output.read_text())

    def finish(self) -> None:
        assert self.process.wait(PATIENCE) == 0, self.output.read_text()


@contextlib.contextmanager
def script(path: Path, text: str, *arguments: str, **environment: str) -> Iterator[Script]:
    path.write_text(text)
    running = Script(path, *arguments, **environment)
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()


def check_interruptions(running: Script) -> None:
    """Press Ctrl-C in `INTERRUPTED`. Once: stop at the next boundary, keep the weights, go on. Twice: abort at once."""
    running.wait_for("pausing")
    running.control_c()
    running.wait_for("stopped")
    running.wait_for("fitted")
    # twice, in the midst of a batch of ten minutes
    running.wait_for("pausing", times=2)
    running.control_c()
    running.wait_for("Once more", times=2)
    assert not running.lines("aborted")
    running.control_c()
    running.wait_for("aborted")
    running.wait_for("goes on")
    running.finish()
    assert len(running.pids()) >= 2
    eventually(lambda: not any(map(alive, running.pids())), "no orphan worker is left")
