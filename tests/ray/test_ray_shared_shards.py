"""Shards in memory that outlives workers: there once, adopted by who comes, never torn; here of CPU workers."""

from __future__ import annotations

import gc
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import Exact, run, same
from gpu.shared_memory import family, shared_bytes
from ray_models import eventually

import raytrainer
from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.driver.workers import ray_segments
from raytrainer.driver.workers.ray_group import RayGroup
from raytrainer.worker.actor.holder import Holder

pytestmark = [pytest.mark.late(2), pytest.mark.usefixtures("staging", "ray_session")]
OPTIONS: dict[str, Any] = {"strategy": "fsdp", "num_processes": 2, "snapshot_every": 2, "max_epochs": 3}


class KilledAsCopied:
    """Its copy is made when the shards' has been, and is not told yet."""

    def __init__(self, flag: str) -> None:
        self.flag = flag

    def __deepcopy__(self, memo: Any) -> KilledAsCopied:
        if os.path.exists(self.flag):
            os.unlink(self.flag)
            os.kill(os.getpid(), signal.SIGKILL)
        return self


class Wide(Exact):
    """With a million parameters. `moments`: a file whose first line says after how many batches its copy kills."""

    def __init__(self, *arguments: Any, folder: str = "") -> None:
        super().__init__(*arguments)
        self.folder = folder
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 1000), torch.nn.LayerNorm(1000), torch.nn.Dropout(0.3), torch.nn.Linear(1000, 1000),
            torch.nn.Tanh(), torch.nn.Linear(1000, 1),
        )  # fmt: skip

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["killed"] = KilledAsCopied(f"{self.folder}/copy")


class Watch(raytrainer.Callback):
    """Notes the most memory that was shared; does what is to be done after some steps."""

    def __init__(self, **after: Any) -> None:
        self.after = {int(name.removeprefix("step")): action for name, action in after.items()}
        self.before = shared_bytes()
        self.most = [0, 0]

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        now = shared_bytes()
        self.most = [max(most, new - old) for most, new, old in zip(self.most, now, self.before, strict=True)]
        for step in [step for step in self.after if report.step >= step]:
            self.after.pop(step)()


def kill_holder() -> None:
    holders = [pid for pid in family() if b"Holder" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert holders
    for pid in holders:
        os.kill(pid, signal.SIGKILL)


def test_workers_and_the_holder_are_killed(tmp_path):
    """In a step; as a state is copied, which then does not count; after the holder, whose place another one takes."""
    calm, struck = Wide(), Wide((1, 9), "kill", f"{tmp_path}/flag", folder=str(tmp_path))
    rows = run(calm, tmp_path, **OPTIONS)[1]
    gc.collect()
    eventually(lambda: shared_bytes()[0] == 0, "a run that nobody knows any more has given its memory back")
    state = 3 * 4 * sum(parameter.numel() for parameter in calm.parameters())
    watch = Watch(step5=kill_holder, step7=(tmp_path / "copy").touch)
    options = OPTIONS | {"max_failures": 2, "spares": 1}
    trainer, struck_rows = run(struck, tmp_path, callbacks=[watch], **options)
    assert same(struck, calm) and struck_rows == rows
    assert watch.after == {} and not (tmp_path / "copy").exists()
    assert [recovery.kept for recovery in trainer.recoveries] == [1, 1]
    assert all(recovery.step - recovery.resumed_step <= 2 for recovery in trainer.recoveries)
    segments, store = watch.most
    assert state < segments <= 2.1 * state and store < 0.5 * state  # which has the module on its way to workers


class Refusing(Holder):
    """As where /proc hides processes from each other."""

    def probe(self, *segments: Any) -> str | None:
        return "processes may not open each other's memory"


@pytest.mark.sample(0)
def test_where_memory_cannot_be_shared_ray_has_a_copy(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ray_segments, "Holder", Refusing)
    calm, struck = Exact(), Exact((1, 9), "kill", f"{tmp_path}/flag")
    rows = run(calm, tmp_path, **OPTIONS)[1]
    before = shared_bytes()[0]
    logging.getLogger("raytrainer").addHandler(caplog.handler)
    try:
        struck_rows = run(struck, tmp_path, callbacks=[watch := Watch()], **OPTIONS)[1]
    finally:
        logging.getLogger("raytrainer").removeHandler(caplog.handler)
    assert same(struck, calm) and struck_rows == rows and watch.most[0] <= before
    said = [message for message in caplog.messages if "kept in main memory twice" in message]
    assert said and "processes may not open each other's memory" in said[0]


class Storable(Wide):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        pass


class Trail(raytrainer.Callback):
    """Saves weights and all else in turn, faster than they are written."""

    every_n_train_steps = 1

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved = folder, list[str]()

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        path = f"{self.folder}/{report.step}-{len(self.saved)}.ckpt"
        trainer.save_checkpoint(path, weights_only=len(self.saved) % 2 == 1)
        self.saved.append(path)


@pytest.mark.sample(0)
def test_files_have_the_weights_of_their_step(tmp_path, monkeypatch):
    """As those of workers whose states Ray copies."""
    found = []
    for name, stages in (("shared", True), ("copied", False)):
        monkeypatch.setattr(RayGroup, "stages", stages)
        trail = Trail(tmp_path / name)
        run(Storable(), tmp_path, callbacks=[trail], **OPTIONS | {"snapshot_every": None})
        found.append([read_checkpoint(path) for path in trail.saved])
    assert len(found[0]) == len(found[1]) > 8
    for ours, theirs in zip(*found, strict=True):
        assert ours["global_step"] == theirs["global_step"] and ours.keys() == theirs.keys()
        for tensors in zip(ours["state_dict"].values(), theirs["state_dict"].values(), strict=True):
            assert torch.equal(*tensors)
        if "optimizer_states" in ours:
            states = [found["optimizer_states"][0]["state"] for found in (ours, theirs)]
            for name, kept in states[0].items():
                assert all(torch.equal(value, states[1][name][key]) for key, value in kept.items())
