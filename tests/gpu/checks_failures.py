"""Workers that die or hang in the middle of NCCL training, and runs that go on from a checkpoint."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from harness import Net, Rows, check, data, distance, fit, uuids
from torch import Tensor

import raytrainer
from raytrainer.driver.workers import idle_pool as pool
from raytrainer.worker.step_records import StepRecords


class Victim(Net):
    """The last rank kills itself, or hangs, once, in the middle of training; rank 0 waits for it in a collective."""

    def __init__(self, how: str = "", flag: str = "") -> None:
        super().__init__(dropout=0.1)
        self.how, self.flag = how, flag

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        victim = self.global_rank == self.trainer.world_size - 1
        if self.how and self.global_step == 17 and victim and not os.path.exists(self.flag):
            Path(self.flag).touch()
            while self.how == "hang":
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


@check(1, workers="all")
def lost_workers() -> str:
    gpus, said = len(uuids()), []
    options = {"gpus": gpus, "snapshot_every": 5, "deterministic": True, "max_epochs": 4, "hang_timeout": 10.0,
               "spares": 1}  # fmt: skip
    calm, rows = Victim(), Rows()
    fit(calm, data(64 * gpus), logger=rows, log_every_n_steps=1, **options)
    assert len(rows.rows) == 32, rows.rows
    for how in ("kill", "hang"):
        struck = Victim(how, f"{tempfile.mkdtemp()}/flag")
        (recovery,) = fit(struck, data(64 * gpus), logger=(own := Rows()), log_every_n_steps=1, **options).recoveries
        assert distance(calm, struck) == 0.0, how
        assert own.rows == rows.rows, (how, rows.rows, own.rows)
        assert (recovery.kept, recovery.spares) == (gpus - 1, 1), (how, recovery)
        said.append(f"{how}: {recovery.seconds:.1f} s, {recovery.replayed_batches} batches again")
    return f"{gpus} GPU(s), weights bit-equal to the undisturbed run, and each step logged once. {'; '.join(said)}"


class Struck(Net):
    """The last rank is killed in some steps: right after its backward pass, which its GPU has not come to, or anywhere.

    Notes each step that is begun. A step takes a GPU some 20 ms, so that it is behind its worker.
    """

    def __init__(self, folder: str = "", where: dict[int, str] | None = None) -> None:
        super().__init__(dropout=0.1)
        self.folder, self.where = folder, where or {}

    def _may_die(self, where: str) -> bool:
        flag, last = Path(f"{self.folder}/struck-{self.global_step}"), self.trainer.world_size - 1
        if self.where.get(self.global_step) != where or self.global_rank != last or flag.exists():
            return False
        flag.touch()
        return True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with open(f"{self.folder}/steps-{self.global_rank}", "a") as file:
            file.write(f"{self.global_step}\n")
        if self._may_die("anywhere"):
            threading.Timer(random.SystemRandom().uniform(0, 0.06), os.kill, (os.getpid(), signal.SIGKILL)).start()
        with torch.no_grad():
            side = 4096 if self.device.type == "cuda" else 256
            other = busy = torch.ones(side, side, device=self.device)
            for _ in range(8):
                other = busy @ other
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        if self._may_die("after backward"):
            os.kill(os.getpid(), signal.SIGKILL)


@check(2, workers="all")
def recorded_steps() -> str:
    gpus, folder = len(uuids()), tempfile.mkdtemp()
    options = {"gpus": gpus, "deterministic": True, "max_epochs": 5, "spares": 1, "log_every_n_steps": 1}
    calm, rows = Struck(tempfile.mkdtemp()), Rows()
    fit(calm, data(64 * gpus), logger=rows, snapshot_every=None, **options)
    struck, own = Struck(folder, {11: "after backward", 21: "anywhere", 30: "anywhere"}), Rows()
    trainer = fit(struck, data(64 * gpus), logger=own, snapshot_every=1, **options)
    assert distance(calm, struck) == 0.0
    assert all(torch.equal(*pair) for pair in zip(calm.losses, struck.losses, strict=True))
    assert own.rows == rows.rows, (rows.rows, own.rows)
    said = [str(recovery) for recovery in trainer.recoveries]
    assert len(said) == 3, said
    assert all(recovery.source == "what each worker had recorded" for recovery in trainer.recoveries), said
    assert all(recovery.replayed_batches <= 3 for recovery in trainer.recoveries), said
    again = [len(Path(f"{folder}/steps-{rank}").read_text().split()) - 40 for rank in range(gpus)]
    assert max(again) <= 9, (again, said)
    return f"{gpus} GPUs, weights and losses bit-equal to the undisturbed run; steps again, by rank: {again}; {said}"


class Recording(Net):
    """Fails where a worker waits for all of its GPU's work while it records a step."""

    def on_train_start(self) -> None:
        self.__dict__["take"] = take = StepRecords.take
        mode: Any = torch.cuda.set_sync_debug_mode if self.device.type == "cuda" else str
        self.recorded = 0

        def strict(records: StepRecords, run: Any, report: Any) -> None:
            mode("error")
            try:
                take(records, run, report)
            finally:
                mode("default")
            self.recorded += records.whole

        StepRecords.take = strict  # type: ignore[method-assign]

    def on_train_end(self) -> None:
        StepRecords.take = self.__dict__.pop("take")  # type: ignore[method-assign]


@check(2, workers="all")
def recording_does_not_wait() -> str:
    gpus, seen = len(uuids()), []
    for options in ({"fused": True}, {"fused": False}, {}):
        module = Recording(**options)
        fit(module, data(64 * gpus), gpus=gpus, snapshot_every=1, precision="bf16-mixed")
        assert module.recorded >= 16, module.recorded
        seen.append(module.recorded)
    return f"no synchronisation in {seen} records: AdamW, fused and not, SGD; a module that gathers tensors"


@check(1, workers="all")
def resumed_runs() -> str:
    gpus, folder = len(uuids()), tempfile.mkdtemp()
    options = {"gpus": gpus, "deterministic": True, "precision": "16-mixed", "accumulate_grad_batches": 2}
    loader = data(64 * gpus, shuffle=True)
    whole, resumed = Victim(), Victim()
    fit(whole, loader, max_epochs=3, **options)
    saver = raytrainer.ModelCheckpoint(folder, save_last=True, every_n_train_steps=5)
    fit(Victim(), loader, max_steps=7, max_epochs=None, callbacks=saver, **options)
    fit(resumed, loader, max_epochs=3, ckpt_path=f"{folder}/last.ckpt", **options)
    assert distance(whole, resumed) == 0.0
    return f"{gpus} GPU(s), 16-mixed, in the middle of an epoch: weights bit-equal to the undisturbed run"


class FirstStep(Net):
    """Notes the moment of its first step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.__dict__.setdefault("first", time.time())
        return super().training_step(batch, batch_idx)


@check(1)
def time_to_first_step() -> str:
    said = []
    raytrainer.Trainer(logger=False).close()
    for name in ("cold workers", "warm workers at once", "warm workers later"):
        if name.endswith("later"):
            assert pool._idle[-1][0].usable  # which they answer when they have given memory back
        module, begun = FirstStep(), time.time()
        fit(module, gpus=len(uuids()))
        said.append(f"{name} {module.first - begun:.2f} s")
    return f"{len(uuids())} GPU(s): " + ", ".join(said)
