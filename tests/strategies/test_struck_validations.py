"""A validation of one round trip, or with training's: what happens to a worker in it changes nothing else."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from exact import Exact, Rows, run, same
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
            if self.how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            os.kill(os.getppid(), signal.SIGINT)  # who presses Ctrl-C presses it for the driver


class Told(Callback):
    """What the driver's callbacks are told, and at which step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_end(self, trainer, module):
        self.seen.append(("validated", trainer.global_step, float(trainer.callback_metrics["val_loss"])))

    def on_exception(self, trainer, module, exception):
        self.seen.append(("failed", trainer.global_step, str(exception), trainer.state.stage))


class ToldOfChunks(Told):
    """Which acts between training and validation, as far as anybody knows."""

    def on_train_chunk_end(self, trainer, module, report):
        pass


class Calls:
    """Verbs that workers have been told, and how many validations have begun with training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.verbs: list[str] = []
        self.together = 0
        call = ForkedGroup.call

        def noting(group: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.verbs.append(method.__name__)
            answers = call(group, method, *args, **kwargs)
            self.together += getattr(answers[0], "validation", None) is not None
            for report in (each for answer in answers for each in (answer, getattr(answer, "validation", None))):
                if hasattr(report, "seconds"):  # by which it is decided whether one comes with training
                    report.seconds = 1e-3
            return answers

        monkeypatch.setattr(ForkedGroup, "call", noting)


class Calm:
    """A run in which nothing happens, and how others are run."""

    def __init__(self, told: type[Told], calls: Calls, folder: Path) -> None:
        self.told, self.calls, self.folder, self.module = told, calls, folder, Exact()
        _, self.rows, self.seen = self.fit(self.module)
        starts, together = calls.verbs.count("start_evaluation"), calls.together
        assert (starts, together) == (1, 5 if told is Told else 0)  # of six, of which the first one starts seen
        calls.verbs.clear()

    def fit(self, module: Exact, **options: Any) -> tuple[Trainer, list[Any], list[Any]]:
        told = self.told()
        defaults = {"strategy": "ddp", "num_processes": 2, "num_sanity_val_steps": 0, "callbacks": [told]}
        trainer, rows = run(module, self.folder, **{**defaults, **options})
        return trainer, rows, told.seen


@pytest.fixture(params=[Told, ToldOfChunks])
def calm(request: Any, forked: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calm:
    return Calm(request.param, Calls(monkeypatch), tmp_path)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_worker_that_is_killed_or_stopped_changes_nothing(how, calm, tmp_path):
    module = Struck((1, BATCHES), how, f"{tmp_path}/flag", verb="validate")
    trainer, rows, seen = calm.fit(module, hang_timeout=0.1)
    (found,) = trainer.recoveries
    assert ("hang_timeout" in found.error) == (how == "stop")
    assert calm.calls.verbs.count("start_evaluation") == 2
    assert same(module, calm.module) and rows == calm.rows
    assert set(seen) == set(calm.seen) and seen[-4:] == calm.seen[-4:]  # two come again, from the run's beginning on


def test_an_error_is_told_once_after_all_that_came_before_it(calm, tmp_path):
    each: dict[str, Any] = {"log_every_n_steps": 1, "accumulate_grad_batches": 1}  # the batch right before it, too
    _, expected, seen = calm.fit(Exact(), **each)
    told, rows = calm.told(), Rows()
    with pytest.raises(ValueError, match="mine"):
        calm.fit(Struck(how="raise", flag=f"{tmp_path}/flag"), callbacks=[told], logger=rows, **each)
    assert told.seen[:-1] == seen[:2] and told.seen[-1] == ("failed", seen[2][1], "mine", "validate")
    third = [index for index, (_, values) in enumerate(expected) if "val_loss" in values][2]
    assert rows.rows == expected[:third]


def test_ctrl_c_ends_the_run_so_that_it_goes_on_as_if_it_had_not(calm, tmp_path):
    trainer, rows, seen = calm.fit(Struck(how="interrupt", flag=f"{tmp_path}/flag"))
    assert trainer.interrupted and trainer.current_epoch == 1
    trainer.save_checkpoint(tmp_path / "interrupted.ckpt")
    module = Exact()
    _, later_rows, later = calm.fit(module, ckpt_path=str(tmp_path / "interrupted.ckpt"))
    assert same(module, calm.module) and [*seen, *later] == calm.seen
    assert [*rows, *later_rows] == calm.rows
