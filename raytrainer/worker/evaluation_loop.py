"""Validation, test and prediction on one worker, in chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from raytrainer.callbacks.base_prediction_writer import BasePredictionWriter
from raytrainer.data.batch_indices import note_indices
from raytrainer.data.feed import Feed
from raytrainer.data.own_generators import hold_generators
from raytrainer.data.transfer import to_cpu
from raytrainer.messages import EvaluationReport, EvaluationStart
from raytrainer.metric_messages import MetricReport, ReadSample, Reduced
from raytrainer.seeding import hold_rng
from raytrainer.worker.evaluation_calls import HOOKS, calls_of
from raytrainer.worker.missing_batches import MissingBatches

if TYPE_CHECKING:
    from raytrainer.worker.worker_run import WorkerRun

__all__ = ["EvaluationLoop"]

_LOADER = {"validate": "val", "test": "test", "predict": "predict"}


class EvaluationLoop:
    """Evaluates all loaders of one stage, once.

    Args:
        run: The run.
        stage: "validate", "test" or "predict".
        sanity: Batches per loader for the sanity check (-1: all), which leaves no metric and no random trace;
            None: a real evaluation.
    """

    def __init__(self, run: WorkerRun, stage: str, sanity: int | None = None) -> None:
        self.run, self.stage, self.sanity = run, stage, sanity
        self.view = run.view
        # before the loaders' hooks; what is begun and cut off is done again by the run that goes on
        self._put_back = hold_rng() if sanity is not None or run.task.stage == "fit" else None
        self.feeds = run.data.feeds(_LOADER[stage])
        # training may read the same datasets
        self._put_back_own = None if sanity is None else hold_generators(feed.source for feed in self.feeds)
        for feed in self.feeds:
            feed.begin(self.view.current_epoch)
        self.lengths: list[int | None] = []
        self.name = HOOKS[stage]
        self.several = len(self.feeds) > 1
        self.calls = calls_of(run, stage, len(self.feeds))
        notes = stage == "predict" and any(isinstance(c, BasePredictionWriter) for c in run.task.callbacks)
        self._next_indices = [note_indices(feed) for feed in self.feeds] if notes else []
        self.loader = 0
        self.batch = 0
        self.done = 0
        self.by_loader = [0] * len(self.feeds)
        self._iterator: Iterator[Any] | None = None
        self._indices: list[Any] | None = None  # of the batch's samples, where a callback wants them
        self._missing = MissingBatches(_LOADER[stage])
        self._through = False  # with the loader; other workers may not be
        self._evaluated = run.evaluated.get(stage, 0)
        self._outer = self.view.running, self.view.metrics.in_batches
        self.metrics = run.view.metrics
        allowed = self.view.settings.inference_mode and run.strategy.inference_mode
        self._no_grad: AbstractContextManager[None] = torch.inference_mode() if allowed else torch.no_grad()
        run.recorder.evaluation = self

    def start(self, within_fit: bool) -> EvaluationStart:
        if all(feed.nothing for feed in self.feeds):
            self._leave()
            return EvaluationStart(self.lengths, nothing=True)
        view, calls = self.view, self.calls
        self.metrics.switch("evaluate")
        self.metrics.in_batches = False
        view.running = "sanity" if self.sanity is not None else self.stage
        if within_fit and self.sanity is None and not self.run.accumulating:
            self.run.module.on_validation_model_zero_grad()
        self.run.strategy.begin_evaluation(self.run.module, within_fit)
        view.modes = {module: module.training for module in self.run.module.modules()}
        with self._no_grad:
            getattr(self.run.module, f"on_{self.name}_model_eval")()
            if calls.start is not None:
                calls.start()
            if calls.epoch_start is not None:
                calls.epoch_start()
        self.lengths = [feed.draw() for feed in self.feeds]
        if self.sanity is not None and self.sanity >= 0:
            self.lengths = [self.sanity if n is None else min(n, self.sanity) for n in self.lengths]
        steady = calls.steady and not view.settings.reload_dataloaders_every_n_epochs
        steady = steady and all(isinstance(feed, Feed) and feed.steady for feed in self.feeds)
        return EvaluationStart(self.lengths, view.tell_stop(), steady=steady)

    def evaluate(self, batches: int, started: EvaluationStart | None = None) -> EvaluationReport:
        """Evaluate at most `batches` batches, up to the loader's end: the next one's may take far longer.

        On a GPU, what the last of them logs comes with the next report, as in training, unless it is known to be the
        last one of all.
        """
        start = time.perf_counter()
        predictions: list[tuple[int, int, Any]] = []
        left, behind, loader = batches, False, self.loader
        strategy, module = self.run.strategy, self.run.module
        with self._no_grad:
            while left > 0 and self.loader < len(self.feeds):
                batch = self._next()
                computes = batch is not None and batch[0] is not None
                if not strategy.begin_round(module, batch is not None, computes):
                    self._next_loader()
                    break
                if batch is None:
                    left -= 1
                    continue
                watched = self.feeds[self.loader].watched
                if watched is not None:
                    watched.add(batch[0])
                if batch[0] is None:
                    self._missing.checked(None)
                    strategy.end_round(module)
                    self.batch += 1
                    self.done += 1
                    left -= 1
                    continue
                if left == 1 and self.run.ahead:
                    self.metrics.begin_report()
                    behind = True
                output = self._evaluate_batch(batch[0])
                strategy.end_round(module)
                if self.stage == "predict" and self.run.task.ask_predictions and self._answers():
                    share = self.run.strategy.share
                    predictions.append((self.loader, self.batch * share.count + share.index, to_cpu(output)))
                self.batch += 1
                self.done += 1
                self.by_loader[self.loader] += self.run.slices.rows > 0
                left -= 1
        if strategy.evaluates_alone:  # where lengths are known, no other round is needed to find that it is over
            while self.loader < len(self.feeds) and self._is_through():
                self._next_loader()
        finished = self.loader >= len(self.feeds)
        self.metrics.begin_batch(None)
        behind = behind and not finished
        report = self.metrics.finish_report() if behind else self.metrics.report()
        report.reads = tuple(self._reads())
        if finished and self.sanity is None:
            self.metrics.add_epoch(report)
        report.stop = self.view.tell_stop()
        seconds = time.perf_counter() - start
        return EvaluationReport(
            self.stage, self.done, seconds, finished, report, predictions, list(self.by_loader), behind,
            quiet=finished and self.calls.quiet, start=started, through=self.loader != loader,
        )  # fmt: skip

    def _reads(self) -> Iterator[ReadSample]:
        for feed in self.feeds:
            if feed.watched is not None:
                yield feed.watched.sample()
                if feed.watched.complete:
                    feed.watched = None

    def _answers(self) -> bool:
        """Whether this worker has had samples of the batch, and is the one to tell of them."""
        return self.run.slices.rows > 0 and self.run.strategy.counts

    def _next(self) -> tuple[Any] | None:
        """The loader's next batch in a tuple; None: it is through."""
        length = self.lengths[self.loader]
        if self._through:
            return None
        if length is None or self.batch < length:
            if self._iterator is None:
                self._iterator = self.feeds[self.loader].start(self.view.current_epoch)
            try:
                batch = next(self._iterator)
            except StopIteration:
                pass
            else:
                if self._next_indices:
                    self._indices = self._next_indices[self.loader]()
                return (batch,)
        self._through = True
        return None

    def _is_through(self) -> bool:
        length = self.lengths[self.loader]
        return self._through or (length is not None and self.batch >= length)

    def _next_loader(self) -> None:
        self._iterator, self._through = None, False
        self.loader += 1
        self.batch = 0

    def _evaluate_batch(self, batch: Any) -> Any:
        transfer, idx = self.run.transfer, self.loader
        batch = self.run.slices.take(batch)
        if self._next_indices:
            self.view.batch_indices = self.run.slices.part_of(self._indices)
        if transfer is not None:
            batch = transfer(batch, idx)
        self.metrics.loader_idx = idx if self.several else None
        self.metrics.in_batches = True
        self.metrics.begin_batch(batch)
        calls = self.calls
        if calls.batch_start is not None:
            calls.batch_start(batch, self.batch, idx)
        output = calls.step(batch, self.batch, idx)
        if calls.batch_end is not None:
            calls.batch_end(output, batch, self.batch, idx)
        if self.metrics.is_log_step(self.run.evaluated[self.stage]):
            self.metrics.note_row(self.run.evaluated[self.stage], self.view.current_epoch)
        if self.sanity is None:
            self.run.evaluated[self.stage] += 1
        return output

    def end_epoch(self, reduced: Reduced | None = None) -> EvaluationReport:
        """The hook after the last batch, which sees values over all workers; report the epoch values."""
        self.metrics.leave_batches(reduced)
        if self.calls.epoch_end is not None:
            with self._no_grad:
                self.calls.epoch_end()
        report = self.metrics.report()
        self.metrics.add_epoch(report)
        report.stop = self.view.tell_stop()
        return EvaluationReport(self.stage, self.done, 0.0, True, report, by_loader=self.by_loader)

    def end(self, reduced: Reduced | None = None, cut_off: bool = False) -> MetricReport:
        """The last hook, which sees what that one has logged, over all workers, too.

        An evaluation that was `cut_off` on some worker leaves no trace in generators: it is done again by a run that
        goes on.
        """
        self.metrics.take_epoch(reduced)
        with self._no_grad:
            if self.calls.end is not None:
                self.calls.end()
            self._put_module_back()
        report = self.metrics.report()
        if self.sanity is not None:
            self.metrics.clear(shown=True)
        self.metrics.switch("train")
        report.stop = self.view.tell_stop()
        self._leave(cut_off)
        return report

    def leave(self, reduced: Reduced) -> None:
        """What `end_epoch` and `end` do where there is no hook for them."""
        self.metrics.leave_batches(reduced)
        with self._no_grad:
            self._put_module_back()
        self.metrics.switch("train")
        self._leave()

    def _put_module_back(self) -> None:
        self.metrics.begin_epoch()
        self.metrics.reset_objects()
        if self.name == "predict":
            self.view.restore_modes()
        else:
            getattr(self.run.module, f"on_{self.name}_model_train")()
        self.run.strategy.end_evaluation(self.run.module)
        self.view.modes = {}

    def _leave(self, cut_off: bool = False) -> None:
        self.run.recorder.evaluation = None
        self.view.running, self.metrics.in_batches = self._outer
        if self.sanity is None:
            if self._put_back is not None and cut_off:
                self._put_back()
                self.run.evaluated[self.stage] = self._evaluated
        elif self._put_back is not None:
            # loaders whose hooks have drawn numbers are made when training would have made them
            self.run.data.forget_drawn(_LOADER[self.stage])
            self._put_back()
            if self._put_back_own is not None:
                self._put_back_own()
