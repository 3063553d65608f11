"""Trials of Ray Tune that have workers: resources nest, stopped trials leave nothing, checkpoints come back."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray_models import Graded, Net, alive, assert_same, eventually, loader

import raytrainer
from raytrainer.driver.workers import idle_pool as pool

pytestmark = pytest.mark.late(2)
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@pytest.fixture(autouse=True)
def usr1_as_before() -> Iterator[None]:
    """Tune leaves a handler of its own behind, beside which nobody else's is installed."""
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def trial(config: dict[str, Any]) -> None:
    callback = raytrainer.TuneReportCallback({"graded": "score", "workers": "workers"})
    trainer = raytrainer.Trainer(max_epochs=3, num_processes=2, seed=1, callbacks=callback, **QUIET)
    trainer.fit(Graded(config["score"], config["notes"]), loader(16, 4), loader(8, 4))


@pytest.mark.sample(0)
def test_asha_stops_a_trial_of_two_workers(
    ray_session: str, one_process: Callable[..., raytrainer.Trainer], tmp_path: Path
) -> None:
    pool.close_idle()
    eventually(lambda: ray.available_resources().get("CPU") == 4.0, "no test before holds a CPU")
    notes = tmp_path / "notes"
    notes.mkdir()
    tuner = tune.Tuner(
        # two CPUs a trial, which cannot ask for more
        tune.with_resources(trial, raytrainer.tune_resources(num_processes=2)),
        param_space={"score": tune.grid_search([2.0, 0.0]), "notes": str(notes)},
        tune_config=tune.TuneConfig(
            metric="graded",
            mode="max",
            scheduler=ASHAScheduler(max_t=3, grace_period=1, reduction_factor=2),
            # one after the other, so that the second one is surely the worst of those that have reported
            max_concurrent_trials=1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="graded", storage_path=str(tmp_path), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors
    by_score = {result.config["score"]: result for result in results}
    assert {score: result.metrics["graded"] for score, result in by_score.items()} == {2.0: 2.0, 0.0: 0.0}
    assert all(result.metrics["workers"] == 2.0 for result in results)
    stopped, best = by_score[0.0], results.get_best_result()
    assert [stopped.metrics[name] for name in ("training_iteration", "epoch", "step")] == [1, 0, 2]
    assert [best.metrics[name] for name in ("training_iteration", "epoch", "step")] == [3, 2, 6]

    processes = [int(path.name.split("-")[-1]) for path in notes.iterdir()]
    assert len(processes) == 4
    eventually(lambda: not any(map(alive, processes)), "workers end with their trial")
    eventually(lambda: ray.available_resources().get("CPU") == 4.0, "their CPUs are free")

    comes_back(best.checkpoint, stopped.checkpoint, one_process)


def comes_back(finished: Any, early: Any, make: Callable[..., raytrainer.Trainer]) -> None:
    """Checkpoints that trials have reported: read, and gone on from."""
    module = Graded.load_from_checkpoint(finished)
    assert module.hparams.score == 2.0
    assert_same(module, Graded.load_from_checkpoint(finished.path))
    assert any(not torch.equal(a, b) for a, b in zip(module.parameters(), Net().parameters(), strict=True))
    trainer = make(max_epochs=2)
    resumed = Graded(0.0, module.hparams.notes)
    trainer.fit(resumed, loader(16, 4), loader(8, 4), ckpt_path=early)
    assert (trainer.current_epoch, trainer.global_step) == (2, 2 + 4)


def within(resources: dict[str, float], function: Callable[[], Any]) -> Any:
    """What a function returns that runs in a reservation, as a trial's does."""
    group = placement_group([resources])
    place = PlacementGroupSchedulingStrategy(group, 0)
    try:
        return ray.get(ray.remote(num_cpus=1)(function).options(scheduling_strategy=place).remote(), timeout=60)
    finally:
        remove_placement_group(group)


@pytest.mark.usefixtures("ray_session")
def test_a_reservation_of_ones_own_is_all_there_is() -> None:
    """One worker trains in the trial's process; several need room in its reservation, and say so at once."""
    pool.close_idle()

    def run() -> list[Any]:
        alone = raytrainer.Trainer(max_epochs=1, **QUIET)
        alone.fit(Net(), loader(16, 4))
        found: list[Any] = [alone.settings.strategy, alone.global_step]
        for options in ({"num_processes": 2}, {"gpus": [0], "strategy": "ddp"}):
            try:
                raytrainer.Trainer(max_epochs=1, **QUIET, **options).fit(Net(), loader(16, 4))
            except raytrainer.RaytrainerError as error:
                found += [type(error).__name__, str(error)]
        return found

    strategy, steps, kind, no_room, other_kind, chosen = within({"CPU": 2.0}, run)
    assert (strategy, steps) == ("local", 4)
    assert kind == "ResourceError" and "raytrainer.tune_resources(num_processes=2)" in no_room
    assert other_kind == "ConfigurationError" and "give gpus as a number" in chosen


@pytest.mark.usefixtures("ray_session")
def test_the_example(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "tune.py"
    spec = importlib.util.spec_from_file_location("example_tune", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    pool.close_idle()
    accuracy = example.main(["--num-samples", "2", "--max-epochs", "2", "--root", str(tmp_path)])
    logs = [path.read_text().splitlines() for path in (tmp_path / "digits").glob("trial_*/result.json")]
    best = min((json.loads(lines[-1]) for lines in logs), key=lambda result: result["val_loss"])
    assert len(logs) == 2 and best["training_iteration"] == 2
    assert accuracy == pytest.approx(best["val_acc"]), "the checkpoint gives here what the trial has reported"
