"""An epoch of forward passes, for statistics such as those of batch normalisation: see `TrainerView.forward_epoch`."""

from __future__ import annotations

import itertools

import torch

from raytrainer.worker.run_data import AnyFeed
from raytrainer.worker.worker_run import WorkerRun

__all__ = ["forward_epoch"]


def forward_epoch(run: WorkerRun, feed: AnyFeed, epoch: int, longest: int) -> None:
    """Run `training_step` on the epoch's batches, at most `longest` where that is known."""
    metrics = run.view.metrics
    step = run.slices.bind(run.step("training_step", 1), run.step_end("training_step"))
    step = run.strategy.evaluation_step(run.module, step)
    agree = run.strategy.all_agree if run.strategy.ranks.world_size > 1 else None
    feed.begin(epoch)
    feed.draw()
    # a loader may go on for ever, in epochs that other limits have ended
    batches = itertools.islice(feed.start(epoch, 0, agree), longest or feed.length)
    kept, run.recorder.keeps = run.recorder.keeps, False
    try:
        with torch.no_grad():
            for index, batch in enumerate(batches):
                if batch is None:
                    continue
                batch = run.slices.take(batch)
                if run.transfer is not None:
                    batch = run.transfer(batch, 0)
                metrics.begin_batch(batch)
                step(batch, index, 0)
    finally:
        run.recorder.keeps = kept
    metrics.begin_batch(None)
    metrics.clear()
