"""The verbs of an evaluation, called as the coordinator calls them: chunks of any size give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Clock, Tiny, data

from raytrainer import Callback, Module
from raytrainer.metrics.metric_board import reduce_partials
from raytrainer.plan.settings import build_settings
from raytrainer.task import Task
from raytrainer.worker import evaluation_loop
from raytrainer.worker.worker import Worker


class Sums(Module):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("sum", batch.sum(), reduce_fx="sum")
        self.log("mean", batch.mean())

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return {"twice": batch * 2, "where": (batch_idx, dataloader_idx)}


def start(stage: str, loaders: Any, **options: Any) -> Worker:
    worker = Worker()
    name = {"validate": "val"}.get(stage, stage)
    worker.setup(Task(stage, Sums(), None, build_settings(**options), [], loaders={name: loaders}))
    return worker


def drive(worker: Worker, stage: str, chunk: int) -> tuple[dict[str, float], list[Any], int]:
    worker.start_evaluation(stage)
    predictions, calls = [], 0
    while True:
        report = worker.evaluate(chunk)
        calls += 1
        predictions += report.predictions
        if report.done:
            break
    end = worker.end_evaluation_epoch().metrics
    worker.end_evaluation()
    worker.finish(False)
    values = {name: reduce_partials(end.specs[name].reduce, [partial]) for name, partial in end.epoch.items()}
    return values, predictions, calls


def to_its_end(worker: Worker) -> int:
    while not (report := worker.evaluate(100)).done:
        pass
    return report.batches


LOADERS = [
    torch.utils.data.DataLoader(torch.arange(10.0), batch_size=4),
    torch.utils.data.DataLoader(torch.arange(3.0), batch_size=1),
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_chunks_do_not_matter(chunk):
    values, _, calls = drive(start("validate", LOADERS), "validate", chunk)
    assert values == {
        "sum/dataloader_idx_0": 45.0,
        "mean/dataloader_idx_0": 4.5,
        "sum/dataloader_idx_1": 3.0,
        "mean/dataloader_idx_1": 1.0,
    }
    assert calls <= 6 // chunk + 2  # one at least for each loader


@pytest.mark.parametrize("chunk", [1, 100])
def test_predictions_say_where_they_belong(chunk):
    _, predictions, _ = drive(start("predict", LOADERS), "predict", chunk)
    assert [(loader, batch) for loader, batch, _ in predictions] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert all(output["where"] == (batch, loader) for loader, batch, output in predictions)
    assert torch.equal(torch.cat([output["twice"] for loader, _, output in predictions if loader == 0]),
                       2 * torch.arange(10.0))  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 100])
def test_a_value_of_the_whole_epoch_has_weight_one(chunk):
    """Over several workers, the size of each one's last batch must not matter for it."""

    class Ending(Sums):
        def on_validation_epoch_end(self):
            self.log("end", 1.0)

    worker = Worker()
    worker.setup(Task("validate", Ending(), None, build_settings(), [], loaders={"val": LOADERS[0]}))
    worker.start_evaluation("validate")
    while not worker.evaluate(chunk).done:
        pass
    assert worker.end_evaluation_epoch().metrics.epoch["end"].weight == 1
    worker.end_evaluation()
    worker.finish(False)


@pytest.mark.parametrize(("limit", "lengths"), [(1.0, [3, 3]), (2, [2, 2]), (0.34, [1, 1]), (50, [3, 3])])
def test_limits_are_per_loader(limit, lengths):
    worker = start("validate", LOADERS, limit_val_batches=limit)
    assert worker.start_evaluation("validate").batches == lengths
    assert to_its_end(worker) == sum(lengths)


@pytest.mark.parametrize(("sanity", "batches"), [(2, 4), (1, 2), (-1, 6), (99, 6)])
def test_sanity_check_takes_some_of_each_loader(sanity, batches):
    worker = start("validate", LOADERS)
    worker.start_evaluation("validate", sanity)
    assert worker.run.view.sanity_checking
    assert to_its_end(worker) == batches
    assert worker.end_evaluation_epoch().metrics.epoch.keys() >= set()
    worker.end_evaluation()
    assert not worker.run.view.sanity_checking
    # a real one afterwards starts from nothing
    values, _, _ = drive(worker, "validate", 100)
    assert values["sum/dataloader_idx_0"] == 45.0


class FastThenSlow(Tiny):
    """A batch of the second loader takes a second, by a clock that it moves; one of the first takes nothing."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        evaluation_loop.time.now += dataloader_idx


def test_a_slow_loader_after_a_fast_one_is_evaluated_in_chunks_of_a_second(local_trainer, monkeypatch):
    seconds: list[float] = []

    class Chunks(Callback):
        def on_evaluation_chunk_end(self, trainer, module, report):
            seconds.append(report.seconds)

    monkeypatch.setattr(evaluation_loop, "time", Clock(0.0))
    local_trainer(callbacks=[Chunks()]).validate(FastThenSlow(), [data(80), data(40)])
    assert seconds == [0.0, 0.0, 0.0, *[1.0] * 20]  # of 1, 16 and the other 23 batches, then one by one
