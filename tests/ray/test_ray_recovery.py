"""Lost workers over real Ray: the run ends as if nothing had happened, and says what did."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import ray
from drifting import Drifting
from exact import Died, Exact, Mortal, run, same
from ray_models import FastForward, eventually

import raytrainer
from raytrainer.driver.workers import ray_answers
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.plan.steps_and_epochs import Progress

pytestmark = pytest.mark.usefixtures("ray_session")
OVER_RAY = {"strategy": "ddp", "num_processes": 2, "snapshot_every": 3}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_ended):
    return {}


def calm_run(undisturbed: dict, folder: Path, kind=Exact, **options):
    """The undisturbed run with these options, once."""
    key = kind, *sorted(options.items())
    if key not in undisturbed:
        module = kind()
        undisturbed[key] = module, *run(module, folder, **{**OVER_RAY, **options})
    return undisturbed[key]


class DiesOften(Drifting):
    """Is killed in several places: (rank, batches done, verb)."""

    def __init__(self, deaths, folder: Path) -> None:
        super().__init__(how="kill")
        self.deaths, self.folder = deaths, str(folder)

    def perish_if_due(self, verb: str) -> None:
        for i, (rank, batches, within) in enumerate(self.deaths):
            self.die, self.verb, self.flag = (rank, batches), within, f"{self.folder}/flag{i}"
            super().perish_if_due(verb)


def test_killed_workers_change_nothing(undisturbed, tmp_path):
    """Before there is a snapshot, and in validation: a new process takes the first one's place, and spares the others'.

    The last one is a worker that has been a spare. Losses depend on what is in no state dict, too.
    """
    deaths = [(1, 0, "train"), (0, 13, "validate"), (0, 17, "train")]
    calm, _, rows = calm_run(undisturbed, tmp_path, Drifting, num_workers=1)
    module = DiesOften(deaths, tmp_path)
    trainer, struck_rows = run(module, tmp_path, num_workers=1, spares=1, **OVER_RAY)
    assert len(list(tmp_path.glob("flag*"))) == len(deaths)
    assert same(module, calm)
    assert struck_rows == rows
    for (rank, _, _), recovery in zip(deaths, trainer.recoveries, strict=True):
        assert f"rank {rank}" in recovery.error
        assert recovery.workers == 2
        assert recovery.step - recovery.resumed_step <= 3
        assert recovery.seconds > 0
    assert [(recovery.kept, recovery.spares) for recovery in trainer.recoveries] == [(1, 0), (1, 1), (1, 1)]
    reserved = {name for name in ray.cluster_resources() if name.startswith("CPU_group_")}
    assert reserved
    eventually(lambda: not reserved & set(ray.available_resources()), "the spare's CPU counts as taken")


@pytest.mark.parametrize(("batches", "verb"), [(0, "train"), (9, "train"), (21, "validate")])
def test_workers_that_die_in_process_change_nothing(tmp_path, monkeypatch, batches, verb):
    """The same with workers that are as if of another process, which cost nothing. An epoch has 14 batches."""
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Mortal())
    calm, module = Exact(), Exact((0, batches), flag=f"{tmp_path}/flag", verb=verb)
    _, rows = run(calm, tmp_path, snapshot_every=3)
    trainer, struck_rows = run(module, tmp_path, snapshot_every=3)
    assert same(module, calm)
    assert struck_rows == rows
    (recovery,) = trainer.recoveries
    assert recovery.step - recovery.resumed_step <= 3


class LosesPatience(raytrainer.Callback):
    """Lets `hang_timeout` pass once one worker hangs, which a file says, and the other one waits for it."""

    def __init__(self, flag: Path, clock: FastForward) -> None:
        self.flag, self.clock = flag, clock

    def hangs(self) -> bool:
        return self.flag.exists() and "the backward pass" in self.trainer.where()[0].waits_for

    def look(self) -> None:
        eventually(self.hangs, "a worker hangs")
        self.clock.added += self.trainer.hang_timeout

    def on_fit_start(self, trainer, module):
        self.trainer, self.looking = trainer, threading.Thread(target=self.look)
        self.looking.start()

    def on_fit_end(self, trainer, module):
        self.looking.join()


def test_a_worker_that_hangs_counts_as_lost(undisturbed, tmp_path, monkeypatch):
    calm, _, rows = calm_run(undisturbed, tmp_path, num_workers=1)
    module = Exact((1, 6), "hang", f"{tmp_path}/flag")
    monkeypatch.setattr(ray_answers, "time", clock := FastForward())
    impatient = LosesPatience(tmp_path / "flag", clock)
    trainer, struck_rows = run(module, tmp_path, num_workers=1, callbacks=[impatient], **OVER_RAY)
    assert same(module, calm)
    assert struck_rows == rows
    (recovery,) = trainer.recoveries
    assert "hang_timeout" in recovery.error and "rank 1 is gone" in recovery.error
    assert recovery.kept == 1


@pytest.mark.late(1.4)
def test_user_errors_are_not_retried(tmp_path):
    with pytest.raises(Died) as caught:
        run(Exact((1, 4), "raise", f"{tmp_path}/flag"), tmp_path, **OVER_RAY)
    assert caught.value.__cause__.rank == 1
    assert "perish_if_due" in caught.value.__cause__.traceback


class DieTogether(Exact):
    """All ranks raise, and so stay for the next run."""

    def perish_if_due(self, verb: str) -> None:
        if verb == "train" and int(self.batches) == 4:
            raise ArithmeticError


@pytest.mark.sample(0)
@pytest.mark.parametrize(
    ("before", "after", "how"),
    [
        pytest.param(2, 1, "raise", marks=pytest.mark.late(1)),
        pytest.param(1, 2, "raise", marks=pytest.mark.late(1)),
        pytest.param(2, 3, "kill", marks=pytest.mark.late(2.5)),  # leaves three workers to those that come then
    ],
)
def test_resumed_with_another_number_of_workers(tmp_path, before, after, how):
    """No sample of the epoch is repeated or missed, but for what padding repeats."""
    seen = f"{tmp_path}/seen"
    module = Exact((0, 4), "kill", f"{tmp_path}/flag", seen) if how == "kill" else DieTogether(seen=seen)
    with pytest.raises(raytrainer.WorkerLostError if how == "kill" else ArithmeticError):
        run(
            module, tmp_path, save_every=1, max_failures=0,
            strategy="ddp", num_processes=before, max_epochs=1, accumulate_grad_batches=1,
        )  # fmt: skip
    done = [p for p in tmp_path.glob("seen-*")]
    lines = [p.read_text().splitlines() for p in done]
    for path in done:
        path.unlink()
    # which checkpoint was handed over before the process died is a matter of moments
    from raytrainer.checkpointing.checkpoint_format import read_checkpoint

    cursor = Progress(**read_checkpoint(f"{tmp_path}/last.ckpt")["progress"])
    assert 1 <= cursor.batch <= 4
    # a worker may have begun a batch that the dying one never finished, and that so does not count
    first = [int(line.split()[1]) for of_rank in lines for line in of_rank[: cursor.batch * 4]]
    run(
        Exact(seen=seen), tmp_path, ckpt_path="last", save_every=1,
        strategy="ddp", num_processes=after, max_epochs=1, accumulate_grad_batches=1,
    )  # fmt: skip
    second = [int(line.split()[1]) for p in tmp_path.glob("seen-*") for line in p.read_text().splitlines()]
    consumed = cursor.batch * before * 4
    assert len(second) - (53 - consumed) < after  # padding alone
    assert set(first) | set(second) == set(range(53))
    assert len(set(first) & set(second)) < after
