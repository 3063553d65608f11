"""States are of the moment in which they were taken, whatever callbacks and training do next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny, data

from raytrainer import Callback, CheckpointError, ModelCheckpoint
from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.driver.saving import checkpoint_writer
from raytrainer.driver.saving.callback_states import own_copy, put_back, states_of


class Live(Callback):
    """Gives what it goes on to change."""

    def __init__(self, size: int = 0) -> None:
        self.seen: dict[Any, Any] = {"before": list(range(size)), "sum": torch.zeros(3)}

    def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
        self.seen[trainer.global_step] = 1
        self.seen["sum"] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


class AddsLive(Live):
    """Adds such a thing to the checkpoint itself."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"seen": self.seen}


class Counting(Tiny):
    """Has a tensor that tells the step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(100_000))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", [Live, AddsLive])
def test_checkpoints_are_of_the_step_that_they_say(
    kind: type[Live], local_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_on = threading.Event()
    real = checkpoint_writer.write_checkpoint
    waited = []

    def late(path: Any, checkpoint: Any, given_up: Any) -> None:
        waited.append(went_on.wait(60.0))  # the first is written late: one may wait while another is written
        real(path, checkpoint, given_up)

    class End(Callback):
        def on_train_chunk_end(self, trainer: Any, module: Any, report: Any) -> None:
            if trainer.global_step >= 2:
                went_on.set()

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", late)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    local_trainer(max_steps=10, callbacks=[kind(), saving, End()]).fit(Counting(), data())
    assert waited == [True] * 10 and len(list(tmp_path.iterdir())) == 10
    for path in tmp_path.iterdir():
        state = read_checkpoint(path)
        step = state["global_step"]
        seen = state["mine"]["seen"] if kind is AddsLive else state["callbacks"]["Live"]["seen"]
        assert sorted(key for key in seen if isinstance(key, int)) == list(range(1, step + 1)), path
        assert seen["sum"].tolist() == [float(step)] * 3
        assert state["state_dict"]["steps"].unique().tolist() == [float(step)], path


def test_states_are_taken_up_more_than_once() -> None:
    callback = Live()
    states = states_of([callback])
    for _ in range(2):
        put_back([callback], states)
        assert set(callback.seen) == {"before", "sum"} and callback.seen["sum"].sum() == 0
        callback.seen[1] = 1
        callback.seen["sum"] += 1


def test_what_cannot_be_copied_is_named() -> None:
    class Changing(dict[str, int]):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("dictionary changed size during iteration")

        def items(self) -> Any:
            raise RuntimeError("dictionary changed size during iteration")

    class Bad(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"x": Changing()}

    with pytest.raises(CheckpointError, match=r"state of the callback .*Bad cannot be copied: RuntimeError"):
        states_of([Bad()])


def test_copies() -> None:
    lock, kept = threading.Lock(), torch.zeros(2)
    grown = torch.ones(2, requires_grad=True) * 2
    value = {"kept": kept, "o": OrderedDict(a=[kept]), "grown": grown, "lock": lock, "t": (1, [2])}
    copied = own_copy(value, keep=[kept])
    assert copied["kept"] is kept and copied["o"]["a"][0] is kept and copied["lock"] is lock
    assert copied["grown"].tolist() == [2.0, 2.0] and not copied["grown"].requires_grad
    assert copied["t"] == (1, [2]) and copied["t"][1] is not value["t"][1]
