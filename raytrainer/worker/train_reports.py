"""What a training loop reports beside its chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raytrainer.messages import TrainStart
from raytrainer.metric_messages import MetricReport
from raytrainer.metrics.metric_store import MetricStore
from raytrainer.strategies.same_shapes import number_of, switched

if TYPE_CHECKING:
    from raytrainer.worker.run_data import AnyFeed
from raytrainer.worker.step_records import StepRecords
from raytrainer.worker.worker_run import WorkerRun

__all__ = ["end_report", "has_trained", "train_start"]


def train_start(run: WorkerRun, feed: AnyFeed, before: Any, now: Any, begins: bool) -> TrainStart:
    """What is to come, at the run's beginning or at an epoch's.

    Args:
        run: The run.
        feed: Its training batches.
        before: What trained when the strategy was prepared.
        now: What trains by now.
        begins: Whether the run begins.
    """
    size = getattr(feed, "batch_size", None)
    size = getattr(feed.source, "batch_size", None) if size is None else size  # of an own loader: anything
    validates = run.data.has_validation and run.task.settings.limit_val_batches != 0
    return TrainStart(
        batches=feed.length,
        batch_size=size if isinstance(size, int) else None,
        val_batches=[feed.length for feed in run.data.feeds("val")] if validates and begins else [],
        plateaus=run.plateaus(),
        stop=run.view.tell_stop(),
        divisible=feed.divisible,
        trained=number_of(now),
        switched=switched(before, now),
    )


def end_report(metrics: MetricStore, records: StepRecords | None, behind: bool) -> MetricReport:
    """What was logged in a chunk that has ended.

    Args:
        metrics: Where it is kept.
        records: Where each step is recorded.
        behind: Whether the device is still at the last batch, whose values are left for the next report.
    """
    if records is not None:
        return records.end_chunk(metrics, behind)
    return metrics.finish_report() if behind else metrics.report()


def has_trained(optimization: Any, began: tuple[int, int, int], batch: int, step: int) -> bool:
    """Whether the batches of an epoch came to any loss, or step; of what others have done, nobody says that it did not.

    Args:
        optimization: Automatic or manual.
        began: Batch, step, and calls without a loss, where this worker has taken up the epoch.
        batch: Where it is now.
        step: Likewise.
    """
    if batch == began[0] > 0:
        return True
    lost = getattr(optimization, "without_loss", None)
    return step > began[1] if lost is None else lost - began[2] < batch - began[0]
