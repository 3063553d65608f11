"""States that are copied aside and handed over by a thread, as those of GPUs are; here of CPU workers."""

from __future__ import annotations

import threading
import time
from typing import ClassVar

import pytest
import torch
from exact import Exact, loaders, run, same
from quiet_trainers import quiet

import raytrainer
from raytrainer.driver.workers.ray_group import RayGroup

pytestmark = [pytest.mark.late(2), pytest.mark.usefixtures("staging", "ray_session")]
OVER_RAY = {"strategy": "ddp", "num_processes": 2, "snapshot_every": 1}


class Unpicklable(Exact):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["lock"] = threading.Lock()


@pytest.mark.sample(0)
@pytest.mark.parametrize("staged", [True, False])
def test_a_state_that_cannot_be_pickled_is_named(staged, tmp_path, monkeypatch):
    monkeypatch.setattr(RayGroup, "stages", staged)
    with pytest.raises(raytrainer.SerializationError, match=r"checkpoint\['lock'\] cannot be pickled.*lock"):
        run(Unpicklable(), tmp_path, save_every=2, **OVER_RAY)


@pytest.mark.sample(0)
def test_a_killed_worker_changes_nothing(tmp_path):
    calm, struck = Exact(), Exact((0, 9), "kill", f"{tmp_path}/flag")
    _, rows = run(calm, tmp_path, save_every=2, **OVER_RAY)
    trainer, struck_rows = run(struck, tmp_path, save_every=2, spares=1, **OVER_RAY)
    assert same(struck, calm)
    assert struck_rows == rows
    (recovery,) = trainer.recoveries
    assert recovery.step - recovery.resumed_step <= 2
    assert (recovery.kept, recovery.spares) == (1, 1)


class Slow(float):
    """A number that takes its time to be pickled, as large states do."""

    threads: ClassVar[set[int]] = set()

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        self.threads.add(threading.get_ident())
        time.sleep(0.1)
        return float, (0.0,)


class Heavy(Exact):
    """With a state that is long on its way, and of which all changes in each step."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.register_buffer("much", torch.zeros(2**18))

    def on_train_batch_start(self, batch, batch_idx):
        self.much += 1

    def on_save_checkpoint(self, checkpoint):
        checkpoint["slow"] = Slow()

    def on_train_end(self):
        self.threads = len(Slow.threads)


class KeepsStates(raytrainer.Callback):
    """Captures at each step, without waiting for what it has got."""

    every_n_train_steps = 1

    def __init__(self) -> None:
        self.captured = []

    def on_train_chunk_end(self, trainer, module, report):
        self.captured.append((report.step, trainer._run.coordinator.capture()))

    def on_train_end(self, trainer, module):
        self.states = [(step, captured.resolve()) for step, captured in self.captured]


def test_states_are_those_of_their_steps(tmp_path):
    keeps = KeepsStates()
    options = {**OVER_RAY, "snapshot_every": None, "max_epochs": None, "max_steps": 4}
    module = Heavy()
    quiet(tmp_path, callbacks=[keeps], accumulate_grad_batches=1, **options).fit(module, loaders()[0])
    assert module.threads == 2, "one makes sure that it can be pickled, the other hands it over"
    assert [step for step, _ in keeps.states] == [1, 2, 3, 4]
    assert all(state["state_dict"]["much"].unique().tolist() == [step] for step, state in keeps.states)


def test_the_last_checkpoint_of_workers_that_do_not_stay(tmp_path):
    module, saver = Heavy(), raytrainer.ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    quiet(tmp_path, callbacks=[saver], max_epochs=1, idle_timeout=0, **OVER_RAY).fit(module, *loaders())
    assert same(module, Heavy.load_from_checkpoint(f"{tmp_path}/last.ckpt"))
