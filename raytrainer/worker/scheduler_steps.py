"""Steps of schedulers: of those that follow training, which in manual optimization the user makes, or a metric."""

from __future__ import annotations

from raytrainer.metric_messages import Number
from raytrainer.metrics.exact_numbers import as_tensor
from raytrainer.view.added_groups import cover_groups
from raytrainer.worker.worker_run import WorkerRun

__all__ = ["SchedulerSteps", "step_plateaus"]


class SchedulerSteps:
    """Steps schedulers by their `interval` and `frequency`."""

    def __init__(self, run: WorkerRun) -> None:
        self.run = run
        self._step = run.hooks.guarded("lr_scheduler_step", run.module.lr_scheduler_step)

    def after_step(self) -> None:
        """Step those that count steps."""
        run, precision = self.run, self.run.precision
        due = [c for c in run.view.lr_scheduler_configs if c.interval == "step" and not c.on_metric]
        scaled = precision.scaler is not None
        if not run.module.automatic_optimization or not due or (scaled and precision.skipped):
            return
        done = run.stepped + 1 - (precision.skipped_steps if scaled else 0)
        for config in due:
            if done % config.frequency == 0:
                cover_groups([config])
                self._step(config.scheduler, None)

    def after_epoch(self, epoch: int) -> None:
        """Step those that count epochs, once an epoch: with its last batch, or when it proves to be over."""
        if self.run.stepped_epoch == epoch or not self.run.module.automatic_optimization:
            return
        self.run.stepped_epoch = epoch
        for config in self.run.view.lr_scheduler_configs:
            if config.interval == "epoch" and not config.on_metric and (epoch + 1) % config.frequency == 0:
                cover_groups([config])
                self._step(config.scheduler, None)


def step_plateaus(run: WorkerRun, values: dict[int, Number]) -> None:
    """Step the schedulers that wait for a metric, by their places, with its value."""
    step, configs = run.hooks.guarded("lr_scheduler_step", run.module.lr_scheduler_step), run.view.lr_scheduler_configs
    cover_groups(configs)
    for index, value in values.items():
        step(configs[index].scheduler, as_tensor(value))
