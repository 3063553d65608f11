"""`Worker`: the verbs that the driver's coordinator speaks. The same class serves in process and in a Ray actor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from raytrainer.errors import RaytrainerError
from raytrainer.messages import (
    Difference,
    EvaluationReport,
    EvaluationStart,
    Fingerprints,
    FinishReport,
    SetupReport,
    TrainReport,
    TrainStart,
)
from raytrainer.metric_messages import MetricReport, MetricSpec, News, Number, Reduced
from raytrainer.place_in_run import advise
from raytrainer.plan.ranks import Ranks
from raytrainer.plan.steps_and_epochs import Past
from raytrainer.task import Task
from raytrainer.worker.coming_home import finished
from raytrainer.worker.evaluation_loop import EvaluationLoop
from raytrainer.worker.make_strategy import make_strategy
from raytrainer.worker.process_group import ProcessGroup, lone_group
from raytrainer.worker.process_memory import give_back_memory
from raytrainer.worker.replica_reports import difference, fingerprints_of
from raytrainer.worker.scheduler_steps import step_plateaus
from raytrainer.worker.staging import Slot, Staging
from raytrainer.worker.step_records import StepRecords, begin_records
from raytrainer.worker.training_loop import TrainingLoop
from raytrainer.worker.unlinking import unlink
from raytrainer.worker.verbs import Wait, verb, verb_of
from raytrainer.worker.worker_run import WorkerRun
from raytrainer.worker.worker_state import capture_state, most_of_state, restore_state

__all__ = ["Worker"]

P = ParamSpec("P")
R = TypeVar("R")


class Worker:
    """Obeys verbs, one at a time. Holds at most one run.

    Args:
        ranks: Its place in the group.
        device: What it trains on.
        in_place: Whether it trains the driver's own module, so that nothing needs to travel at the end.
    """

    def __init__(
        self, ranks: Ranks | None = None, device: torch.device | None = None, *, in_place: bool = False
    ) -> None:
        self.in_place, self.ranks, self.device = in_place, ranks or Ranks(), device or torch.device("cpu")
        self.group: ProcessGroup | None = None
        self._run: WorkerRun | None = None
        self._training: TrainingLoop | None = None
        self._evaluation: EvaluationLoop | None = None
        self._finished: Any = None
        self.staging = Staging(self.device)
        self.records: StepRecords | None = None  # of the latest run: asked for when others of the group are lost

    @property
    def run(self) -> WorkerRun:
        if self._run is None:
            raise RaytrainerError("this worker has no run; this is a bug in raytrainer")
        return self._run

    def obey(self, method: Callable[Concatenate[Worker, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Obey a verb; if that fails, tell the run's worker callbacks."""
        verb_of(method)
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            advise(error)
            told = error if self._run is None else self._run.hooks.tell(error)
            if told is not error:
                raise told from error
            raise

    @verb(Wait.USER_CODE, takes_task=True)
    def prepare_data(self, task: Task) -> None:
        """Run `prepare_data` of DataModule and Module, in one worker of each node."""
        for owner in (task.datamodule, task.module):
            if owner is not None:
                owner.prepare_data()

    @verb(Wait.USER_CODE, takes_task=True)
    def setup(self, task: Task) -> SetupReport:
        """Take up a run, dropping what an earlier one may have left."""
        self.abandon()
        self.staging.begin()
        if self.group is None and task.settings.sharding is not None:
            self.group = lone_group(self.device)
        strategy = make_strategy(task.settings, self.ranks, self.device, self.group, task.seed)
        self._run = WorkerRun(task, strategy, replaceable=not self.in_place)
        return self._run.setup()

    @verb(Wait.USER_CODE)
    def start_fit(self, epoch: int = 0) -> None:
        self.run.view.current_epoch = epoch
        self.run.hooks.call("on_fit_start")

    @verb(Wait.USER_CODE)
    def start_training(self) -> TrainStart:
        self._training = TrainingLoop(self.run)
        start = self._training.describe()
        self.run.hooks.call("on_train_start")
        self.records = self._training.records = begin_records(self.run, self.group)
        start.stop, start.records = start.stop | self.run.view.tell_stop(), self.records is not None
        return start

    @property
    def training(self) -> TrainingLoop:
        assert self._training is not None
        return self._training

    @property
    def evaluation(self) -> EvaluationLoop:
        assert self._evaluation is not None
        return self._evaluation

    @verb(Wait.USER_CODE)
    def start_epoch(
        self, epoch: int, skip: int = 0, before: Past = (), resumed: bool = False, news: News | None = None
    ) -> TrainStart:
        """See TrainingLoop. `news` are metrics reduced over all workers since the last ones, and requests."""
        self.run.view.hear(news)
        return self.training.start_epoch(epoch, skip, before, resumed)

    @verb(Wait.TRAINING)
    def train(
        self, batches: int, stop_at_step: int | None = None, news: News | None = None, more: bool = False,
        chunk: int = 1, vote_every: int = 1, validates: int = 0,
    ) -> TrainReport:  # fmt: skip
        """A chunk, then so many batches that it `validates`. `news`: see `start_epoch`; others: see TrainingLoop."""
        self.run.view.hear(news)
        self.training.unheard = MetricReport()
        report = self.training.train(batches, stop_at_step, more, chunk, vote_every)
        self.run.accumulating = report.batch % self.run.view.accumulate_grad_batches != 0 and not report.exhausted
        if self.ranks.rank:  # the driver reads a thousand of these
            report.metrics = report.metrics.shared()
        if validates and report.batches == batches and not report.exhausted:
            self.training.unheard = report.metrics
            report.validation = self.evaluate(validates, "validate")
        return report

    @verb(Wait.TRAINING)
    def report_steps(self, failed: bool, unheard: bool = False) -> MetricReport:
        """What a chunk's report has left for the next one; if the run has failed, all up to the batch in progress."""
        metrics = self.run.view.metrics
        if failed:
            metrics.switch("train")
            metrics.forget_batch()
            metrics.give_back(self.training.unheard if unheard else MetricReport())
        elif self.records is not None:
            self.records.finish(metrics)
        return metrics.report().shared() if self.ranks.rank else metrics.report()

    @verb(Wait.USER_CODE)
    def end_batches(self, step_schedulers: bool = True) -> MetricReport:
        """The epoch has no batch left, or the run ends within it; report the epoch's values before its last hooks."""
        self.run.accumulating &= not step_schedulers
        return self.training.end_batches(step_schedulers)

    @verb(Wait.USER_CODE)
    def step_plateaus(self, values: dict[int, Number], metrics: Reduced | None = None) -> None:
        """Step these schedulers with these values. `metrics`: see `start_epoch`."""
        self.run.view.metrics.take(metrics)
        step_plateaus(self.run, values)

    @verb(Wait.USER_CODE)
    def compute_metrics(self, specs: list[MetricSpec], epoch_ended: bool = False) -> dict[str, float]:
        """Values of metric objects over all workers, from rank 0; if the training epoch has ended, all begin anew."""
        return self.run.compute_metrics(specs, epoch_ended)

    @verb(Wait.TRAINING)
    def fingerprints(self, parameters: bool = True) -> Fingerprints:
        """Of what all workers are to hold alike; without `parameters`: of buffers alone."""
        return fingerprints_of(self.run, parameters)

    @verb(Wait.TRAINING)
    def compare(self, names: list[str]) -> list[Difference]:
        """How these tensors differ from those of rank 0."""
        return [difference(self.run, name) for name in names]

    @verb(Wait.USER_CODE)
    def end_epoch(self, metrics: Reduced | None = None, epoch_ended: bool = True, stop: bool = False) -> MetricReport:
        """The last hooks; `metrics` are the epoch's so far, over all workers; `stop`: whether anybody has asked to."""
        self.run.view.hear(News(stop=stop))
        return self.training.end_epoch(metrics, epoch_ended)

    @verb(Wait.USER_CODE)
    def end_training(
        self, epochs: int = 0, interrupted: bool = False, metrics: Reduced | None = None, stop: bool = False
    ) -> None:
        """Training is over, after so many epochs. `metrics`: see `start_epoch`; `stop`: see `end_epoch`."""
        self.training.end(epochs, interrupted, metrics, stop)

    @verb(Wait.USER_CODE)
    def end_fit(self) -> None:
        self.run.hooks.call("on_fit_end")

    @verb(Wait.USER_CODE)
    def start_evaluation(self, stage: str, sanity: int | None = None, news: News | None = None) -> EvaluationStart:
        self.run.view.hear(news)
        self._evaluation = EvaluationLoop(self.run, stage, sanity)
        return self._evaluation.start(within_fit=self.run.task.stage == "fit")

    @verb(Wait.TRAINING)
    def evaluate(self, batches: int, stage: str | None = None, news: News | None = None) -> EvaluationReport:
        """A chunk; with `stage`, the first one of an evaluation that starts here, as the one before was `steady`."""
        start = None if stage is None else self.start_evaluation(stage, None, news)
        return self.evaluation.evaluate(batches, start)

    @verb(Wait.USER_CODE)
    def end_evaluation_epoch(self, metrics: Reduced | None = None) -> EvaluationReport:
        """All batches are done; `metrics` are the evaluation's so far, over all workers."""
        return self.evaluation.end_epoch(metrics)

    @verb(Wait.USER_CODE)
    def end_evaluation(self, metrics: Reduced | None = None, cut_off: bool = False) -> MetricReport:
        """The last hooks; `metrics` are the evaluation's, over all workers. `cut_off`: see EvaluationLoop."""
        report, self._evaluation = self.evaluation.end(metrics, cut_off), None
        return report

    @verb(Wait.USER_CODE)
    def leave_evaluation(self, metrics: Reduced) -> None:
        """In place of `end_evaluation_epoch` and `end_evaluation`, where there is no hook for them."""
        self.evaluation.leave(metrics)
        self._evaluation = None

    @verb(Wait.AT_ONCE)
    def cursor(self) -> tuple[int, int, int, str | None] | None:
        """After a failure: epoch, batches done in it, steps in the run, and what ran; None before the first epoch."""
        if self._training is None or not self._training.has_begun:
            return None
        view, batch = self.run.view, self._training.batch
        self.run.accumulating = batch % view.accumulate_grad_batches != 0
        return self._training.epoch, batch, view.global_step, view.running

    def capture(
        self, weights_only: bool, replica: bool = False, live: bool = False, final: bool = False, slot: Slot = None
    ) -> dict[str, Any]:
        """Its share of a checkpoint, copied aside (`slot`: see `Staging.copy`); `live`: what is read in time is not."""
        state = capture_state(self.run, weights_only, replica, final)
        return state if live and self.device.type == "cpu" else self.staging.copy(state, slot)

    @verb(Wait.TRAINING)
    def prepare_capture(self) -> None:
        """Captures will follow: have a thread take the memory for the first one, which a GPU's copies need pinned."""
        if self.device.type == "cuda" or self.staging.shared is not None:
            self.staging.reserve(most_of_state(self.run, replica=True))

    @verb(Wait.USER_CODE, shares=True)
    def restore(self, checkpoint: dict[str, Any]) -> SetupReport:
        """Put module, optimizers, schedulers and generators into a checkpoint's state; this completes `setup`."""
        restore_state(self.run, checkpoint)
        return self.run.describe()

    @verb(Wait.USER_CODE)
    def finish(self, trained: bool) -> FinishReport:
        """Tear the run down; where it has trained a copy of the driver's module, rank 0 hands over the results."""
        report = finished(self.run, travels=trained and not self.in_place)
        unlink(self._forget())
        return report

    @verb(Wait.USER_CODE)
    def fetch_module(self) -> Any:
        """The whole module of the run just finished, for a driver whose own lacks what was built in the worker."""
        return self._finished.cpu() if self._finished is not None and self.ranks.rank == 0 else None

    @verb(Wait.USER_CODE)
    def tell(self, error: BaseException) -> None:
        """Tell the run's callbacks of an error of the driver's side."""
        if self._run is not None:
            self._run.hooks.tell(error)

    @verb(Wait.AT_ONCE)
    def abandon(self) -> None:
        """Drop the run without any further hook."""
        unlink(self._forget(), release=True)  # forgotten first: if its undoing raises, the next run must not meet it

    @verb(Wait.AT_ONCE)
    def rest(self) -> None:
        """No run for now: give back what the latest one, finished or not, still holds."""
        self.abandon()
        self._finished = None
        give_back_memory(self.device)

    def _forget(self) -> tuple[WorkerRun | None, TrainingLoop | None, EvaluationLoop | None]:
        over = self._run, self._training, self._evaluation
        self._finished = None if over[0] is None else over[0].module
        self._run = self._training = self._evaluation = self.records = None
        return over
