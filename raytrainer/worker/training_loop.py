"""The training loop of one worker: chunks of batches, each a step or part of one.

In pseudocode, hooks aside:

    for batch in chunk:
        batch to the device
        loss = training_step(batch); zero gradients; backward
        on stepping batches: clip; optimizer step; schedulers that count steps
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from raytrainer.data.look_ahead import LookAhead
from raytrainer.errors import ConfigurationError
from raytrainer.messages import TrainReport, TrainStart
from raytrainer.metric_messages import MetricReport, News, Reduced
from raytrainer.plan.steps_and_epochs import Past
from raytrainer.seeding import rng_untouched
from raytrainer.strategies.same_shapes import what_trains
from raytrainer.worker.automatic_optimization import AutomaticOptimization, visible, with_loss
from raytrainer.worker.common_stop import common_stop
from raytrainer.worker.forward_epoch import forward_epoch
from raytrainer.worker.hook_calls import skips_the_epoch
from raytrainer.worker.manual_optimization import ManualOptimization
from raytrainer.worker.missing_batches import MissingBatches, unless_missing
from raytrainer.worker.optimizers import refuse_exchanged
from raytrainer.worker.scheduler_steps import SchedulerSteps
from raytrainer.worker.step_records import StepRecords
from raytrainer.worker.train_reports import end_report, has_trained, train_start

if TYPE_CHECKING:
    from raytrainer.worker.run_data import AnyFeed
from raytrainer.worker.worker_run import WorkerRun
from raytrainer.worker.worker_state import begin_epoch

__all__ = ["TrainingLoop"]


class TrainingLoop:
    """Trains on what the driver asks for; `batch` and `epoch` are the data cursor."""

    def __init__(self, run: WorkerRun) -> None:
        self.run, self.view, self.metrics = run, run.view, run.view.metrics
        run.recorder.training = self
        feeds = run.data.feeds("train")
        if len(feeds) != 1:
            raise ConfigurationError(
                f"{len(feeds)} training datasets: return one from train_dataset(), joined by Ray Data's union or zip; "
                f"several loaders (train_dataloader) may be combined."
            )
        self.feed: AnyFeed = feeds[0]
        self.records: StepRecords | None = None  # where each step is recorded
        self.epoch = self.batch = 0
        self.has_begun = False  # an epoch
        self.unheard = MetricReport()  # of a chunk with which a validation comes, in case that fails
        self._since = 0  # moment before the batches that are accumulated
        self._iterator: Iterator[Any] | None = None
        self._run_batch = self._bind_optimization()
        bind = run.hooks.bind
        self._on_batch_start = bind("on_train_batch_start")
        self._on_batch_end = run.after_batch(bind("on_train_batch_end"))
        self._schedulers = SchedulerSteps(run)
        self.view.forward_epoch = lambda: forward_epoch(run, self.feed, self.epoch, self._longest)
        self._longest: int = 0  # batches of the longest epoch so far
        self._before = False  # groups of other sizes have done part of the epoch
        self._began = 0, 0, 0  # batch, step and calls without a loss when this worker has taken up the epoch
        self._idle = False  # has had no sample in this epoch: batches were None, or had fewer than the node has workers

    def _bind_optimization(self) -> AutomaticOptimization | ManualOptimization:
        run, module = self.run, self.run.module
        self._trained = self._trains = what_trains(module)  # when the strategy was prepared, and now
        step = run.slices.bind(run.step("training_step", 1), run.step_end("training_step"))
        alone = run.strategy.may_skip_alone(module) or not self.feed.may_miss
        self._missing = MissingBatches("train", None if alone else run.strategy.all_agree)
        if module.automatic_optimization:
            return AutomaticOptimization(run, run.strategy.prepare(module, with_loss(run, step)))
        return ManualOptimization(run, run.strategy.prepare(module, unless_missing(step)))

    def describe(self, begins: bool = True) -> TrainStart:
        """What is to come, at the run's beginning or at an epoch's."""
        return train_start(self.run, self.feed, self._trained, self._trains, begins)

    def start_epoch(self, epoch: int, skip: int = 0, before: Past = (), resumed: bool = False) -> TrainStart:
        """Begin `epoch` at this worker's batch `skip`; build the loader anew where the settings ask for that.

        `before` is what groups of other sizes have done of it; `resumed`: it has begun before the run was resumed.
        """
        self.view.current_epoch, self.epoch, self.has_begun = epoch, epoch, True
        every = self.view.settings.reload_dataloaders_every_n_epochs
        if every and epoch and epoch % every == 0 and skip == 0:
            for stage in ("train", "val"):
                self.run.data.make_anew(stage)
            self.feed = self.run.data.feeds("train")[0]
        self.batch = skip
        self._idle = skip == 0 or self.run.slices.active
        self.view.running = "train"
        self._iterator = None
        self._before = bool(before)
        self.feed.begin(epoch, before)
        begin_epoch(self.run, skip, resumed)
        self._trains = what_trains(self.run.module)
        self._run_batch.accumulate = self.view.accumulate_grad_batches
        self._began = skip, self.view.global_step, getattr(self._run_batch, "without_loss", 0)
        self.feed.draw()
        return self.describe(begins=False)

    def _prepare_again(self) -> None:
        """Where parameters have been frozen or unfrozen since, have the strategy synchronise those that train now."""
        if self._trains != self._trained and self.run.module.automatic_optimization:
            self._run_batch, self._began = self._bind_optimization(), (*self._began[:2], 0)

    def _batches(self) -> Iterator[Any]:
        if self._iterator is None:
            strategy = self.run.strategy
            agree = strategy.all_agree if strategy.ranks.world_size > 1 else None
            # going on within an epoch: what a loader that cannot skip reads again has been drawn before
            with rng_untouched() if self.batch else nullcontext():
                self._iterator = self.feed.start(self.epoch, self.batch, agree)
        return self._iterator

    def train(
        self, batches: int, stop_at_step: int | None = None, more: bool = False, chunk: int = 1, vote_every: int = 1
    ) -> TrainReport:
        """Train at most `batches` batches, ending early at an optimizer step, at the loader's end, or to stop.

        Args:
            batches: How many.
            stop_at_step: End early once this optimizer step is reached or passed.
            more: Whether another chunk follows at once. A GPU is then kept busy in between: the report waits for all
                batches but the last one, whose values come with the next report.
            chunk: The chunk's number, higher than that of any before it.
            vote_every: After so many batches, workers of several hosts find out whether one of them is asked to stop.
        """
        clock = time.perf_counter
        start = clock()
        if self.batch == self._began[0]:  # the epoch's first batch here; all workers have begun it
            self._prepare_again()
        run, view, metrics, transfer = self.run, self.view, self.metrics, self.run.transfer
        slices, watched, records = run.slices, self.feed.watched, self.records
        view.running, metrics.in_batches = "train", True
        steps_before = view.global_step
        iterator, length = self._batches(), self.feed.length
        look_ahead = iterator if isinstance(iterator, LookAhead) else None
        # a loader whose state is kept before it reads ahead is to be told of the last batch
        stop = common_stop(run.strategy, view, bool(look_ahead and look_ahead.keep), chunk, vote_every, self.batch)
        next_batch = run.profiled("next_batch", iterator.__next__)
        accumulate, agrees, stepping = view.accumulate_grad_batches, self._missing.agree is not None, True
        first, exhausted, behind, waited = self.batch, False, False, clock() - start

        def reported(logged: MetricReport, exhausted: bool) -> TrainReport:
            """The chunk so far."""
            return TrainReport(
                batches=self.batch - first,
                batch=self.batch,
                step=view.global_step,
                seconds=clock() - start,
                exhausted=exhausted,
                stop=view.asks_to_stop,
                data_seconds=waited,
                metrics=logged,
                skipped_steps=view.skipped_steps,
                steps=view.global_step - steps_before,
                row=max(0, run.stepped - stepping),
                records=records is not None and records.whole,
            )

        if records is not None and records.begin_chunk(chunk) and self.batch:  # else the epoch's first hooks come again
            records.take(run, reported(MetricReport(), False))
        for left in range(batches, 0, -1):
            stopping, asked = stop.before(), clock()
            if look_ahead is not None:
                ends = stop_at_step is not None and view.global_step + 1 >= stop_at_step
                look_ahead.keeping = left == 1 or ends or stopping or records is not None
            try:
                batch = next_batch()
            except StopIteration:
                if self.batch == 0 and not self._before and (look_ahead is None or look_ahead.ended):
                    self.feed.refuse_nothing(self.epoch)
                exhausted = True
                break
            waited += clock() - asked
            index = self.batch
            if watched is not None:
                watched.add(batch)
            if batch is None or agrees:
                batch = self._missing.checked(batch)
            if slices.active:
                batch = slices.take(batch)
            there = batch is not None
            if self._idle and there and slices.rows:
                self._idle = False
            if transfer is not None and there:
                batch = transfer(batch, 0)
            if left == 1 and more and run.ahead:
                behind = True
                if records is None:
                    metrics.begin_report()
            if accumulate > 1 and index % accumulate == 0:
                self._since = metrics.moment
            metrics.begin_batch(batch)
            if self._on_batch_start is not None:
                if there and skips_the_epoch(self._on_batch_start(batch, index)):
                    stop.skipped(index)
                    exhausted = True
                    break
                stop.go_on()
            view.is_last_batch = last = index + 1 == length or (look_ahead is not None and look_ahead.is_last)
            stepping = last or accumulate == 1 or (index + 1) % accumulate == 0
            outputs = self._run_batch(batch, index, stepping)
            self.batch = index + 1  # the weights have had it: where a hook fails now, a resumed run goes on after it
            try:
                if stepping and view.lr_scheduler_configs:
                    self._schedulers.after_step()
                    if last:
                        self._schedulers.after_epoch(self.epoch)
                if self._on_batch_end is not None and there:
                    self._on_batch_end(visible(outputs, self._run_batch.accumulate), batch, index)
            except BaseException:
                self._end_step(stepping, accumulate)
                metrics.begin_batch(None)  # what it has logged counts
                raise
            self._end_step(stepping, accumulate)
            if look_ahead is not None and last:
                exhausted = True
            if records is not None:
                metrics.begin_batch(None)
                records.take(run, reported(MetricReport(), exhausted))
            if exhausted:
                break
            if stop_at_step is not None and view.global_step >= stop_at_step:
                behind = False
                break
            if stop.after():
                behind = False
                break
        self._run_batch.end_chunk()
        refuse_exchanged(view.optimizers, view.given_optimizers or ())
        stop.close()
        self._longest = max(self._longest, self.batch)
        metrics.begin_batch(None)
        behind = behind and not exhausted
        report = end_report(metrics, records, behind)
        if watched is not None:
            report.reads = (watched.sample(),)
            if watched.complete:
                self.feed.watched = None
        leaves = look_ahead is not None and look_ahead.leaves
        done = reported(report, exhausted)
        done.stop, done.behind, done.leaves = view.tell_stop(), behind, leaves
        return done

    def _end_step(self, stepping: bool, accumulate: int) -> None:
        if stepping:
            row, every = self.run.stepped, self.metrics.every
            if every and self.metrics.is_log_step(row):
                self.metrics.note_row(row, self.epoch, self._since if accumulate > 1 else None)
                self.metrics.note_samples(row, self.epoch, self.view.samplers)
            self.run.stepped += 1

    def end_batches(self, step_schedulers: bool) -> MetricReport:
        """Step the schedulers that count epochs, if the epoch ends here; report its metrics so far."""
        if step_schedulers:
            self._schedulers.after_epoch(self.epoch)
        return self._report_epoch()

    def end_epoch(self, reduced: Reduced | None = None, epoch_ended: bool = True) -> MetricReport:
        """Run the module's hook, which sees values over all workers; report the epoch's metrics.

        Where a run ends within an epoch, a checkpoint keeps the sums, so that another run can end it.
        """
        self._iterator = None
        self.metrics.leave_batches(reduced)
        self.run.hooks.call("on_train_epoch_end")
        self.view.running = None
        report = self._report_epoch()
        if epoch_ended:
            self.metrics.begin_epoch()
            self.run.epoch_began = False
        return report

    def end(self, epochs: int, interrupted: bool, reduced: Reduced | None, stop: bool) -> None:
        """Training is over, after so many epochs."""
        self.run.go_on()  # which has gone on, after a loss, where it was to end
        view = self.view
        self.metrics.take_epoch(reduced)
        view.interrupted, view.current_epoch = interrupted, epochs
        view.hear(News(stop=stop))
        self.run.hooks.call("on_train_end")

    def _report_epoch(self) -> MetricReport:
        report = self.metrics.report()
        self.metrics.add_epoch(report)
        report.idle, report.stop = self._idle, self.view.tell_stop()
        report.trained = has_trained(self._run_batch, self._began, self.batch, self.view.global_step)
        return report
