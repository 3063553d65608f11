"""What happens to a worker within a validation that takes one round trip changes nothing else."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from exact import Exact, run, same
from forked_group import ForkedGroup

from raytrainer import Callback, Trainer

#: Batches that each of two workers has done when the run's third validation, the first of an epoch, begins.
BATCHES = 10


class Struck(Exact):
    """Rank 1 is struck once, in its first batch of that validation."""

    def perish_if_due(self, verb: str) -> None:
        if self.how == "kill":
            super().perish_if_due(verb)
        elif (verb, self.global_rank, int(self.batches)) == ("validate", 1, BATCHES) and not os.path.exists(self.flag):
            Path(self.flag).touch()
            if self.how == "raise":
                raise ValueError("mine")
            os.kill(os.getppid(), signal.SIGINT)  # who presses Ctrl-C presses it for the driver


class Told(Callback):
    """What the driver's callbacks are told, and at which step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_end(self, trainer, module):
        self.seen.append(("validated", trainer.global_step, float(trainer.callback_metrics["val_loss"])))

    def on_exception(self, trainer, module, exception):
        self.seen.append(("failed", trainer.global_step, str(exception)))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, forked: Any) -> list[str]:
    """Verbs that workers have been told."""
    verbs: list[str] = []
    call = ForkedGroup.call

    def noting(group: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        verbs.append(method.__name__)
        return call(group, method, *args, **kwargs)

    monkeypatch.setattr(ForkedGroup, "call", noting)
    return verbs


def fitted(module: Exact, folder: Path, **options: Any) -> tuple[Trainer, list[Any], list[Any]]:
    callback = Told()
    options = {"strategy": "ddp", "num_processes": 2, "num_sanity_val_steps": 0, "callbacks": [callback], **options}
    trainer, rows = run(module, folder, **options)
    return trainer, rows, callback.seen


@pytest.fixture
def calm(told: list[str], tmp_path: Path) -> tuple[Exact, list[Any], list[Any]]:
    module = Exact()
    _, rows, seen = fitted(module, tmp_path)
    assert told.count("start_evaluation") == 1  # of the first of six; the others begin with their first message
    told.clear()
    return module, rows, seen


def test_a_killed_worker_changes_nothing(calm, told, tmp_path):
    module = Struck((1, BATCHES), "kill", f"{tmp_path}/flag", verb="validate")
    trainer, rows, seen = fitted(module, tmp_path)
    assert len(trainer.recoveries) == 1 and told.count("start_evaluation") == 2
    assert same(module, calm[0]) and rows == calm[1]
    assert set(seen) == set(calm[2]) and seen[-4:] == calm[2][-4:]  # two come again, from the run's beginning on


def test_an_error_is_told_once_after_all_that_came_before_it(calm, told, tmp_path):
    callback = Told()
    module = Struck(how="raise", flag=f"{tmp_path}/flag")
    with pytest.raises(ValueError, match="mine"):
        run(module, tmp_path, strategy="ddp", num_processes=2, num_sanity_val_steps=0, callbacks=[callback])
    (*before, (what, step, error)) = callback.seen
    validated = [each for each in calm[2] if each[1] < step]
    assert (what, error) == ("failed", "mine") and before == validated and len(told) > 0
    assert told.count("evaluate") > told.count("start_evaluation")


def test_ctrl_c_ends_the_run_so_that_it_goes_on_as_if_it_had_not(calm, told, tmp_path):
    module = Struck(how="interrupt", flag=f"{tmp_path}/flag")
    trainer, rows, seen = fitted(module, tmp_path)
    assert trainer.interrupted and trainer.current_epoch == 1
    trainer.save_checkpoint(tmp_path / "interrupted.ckpt")
    further = Exact()
    _, later_rows, later = fitted(further, tmp_path, ckpt_path=str(tmp_path / "interrupted.ckpt"))
    assert same(further, calm[0]) and [*seen, *later] == calm[2]
    assert [*rows, *later_rows] == calm[1]
