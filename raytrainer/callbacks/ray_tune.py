"""Ray Tune: report a trial's metrics and checkpoints, and reserve what its workers need."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from raytrainer.callbacks.callback import Callback
from raytrainer.errors import ConfigurationError, StorageError
from raytrainer.plan.given_arguments import answers

if TYPE_CHECKING:
    from ray.tune import PlacementGroupFactory

    from raytrainer.callbacks.running_trainer import RunningTrainer
    from raytrainer.module import Module

__all__ = ["TuneReportCallback", "tune_resources"]

_log = logging.getLogger("raytrainer")

_MOMENTS = ("validation_end", "train_epoch_end")


class TuneReportCallback(Callback):
    """Reports metrics, and a checkpoint to go on from, to Ray Tune: from inside a trial's function.

    A trial that a scheduler stops ends at its next report, and its workers with it. Outside of a trial it does nothing.
    "epoch" and "step" are reported too.

    Args:
        metrics: What to report: a name or several of `trainer.callback_metrics`, or a mapping from the name in Tune to
            that name. What is named is reported once all of it is new since the last report, so that a scheduler judges
            no value twice. None: all of them.
        on: "validation_end": after each validation, when epoch values of training are those of the epoch before;
            "train_epoch_end": after each training epoch. None: after each training epoch in which there was a
            validation, so that values of both belong together; if the run has none, after each.
        checkpoint: Report a checkpoint with them. It is a whole one: give `ray.tune.get_checkpoint()` to
            `fit(ckpt_path=...)`, or `result.checkpoint` to `Module.load_from_checkpoint`.

    Raises:
        ConfigurationError: `on` is neither, or (when reporting) a metric was not logged.
    """

    runs_last: ClassVar[bool] = True

    def __init__(
        self,
        metrics: str | Sequence[str] | Mapping[str, str] | None = None,
        on: str | None = None,
        checkpoint: bool = True,
    ) -> None:
        if on is not None and on not in _MOMENTS:
            raise ConfigurationError(f"TuneReportCallback(on={on!r}): allowed are {_MOMENTS[0]!r} and {_MOMENTS[1]!r}")
        names = [metrics] if isinstance(metrics, str) else metrics
        self.metrics = None if names is None else dict(names) if isinstance(names, Mapping) else {n: n for n in names}
        self.on, self.checkpoint = on, checkpoint
        self._in_trial = self._validated = False
        self._begin()

    def _begin(self) -> None:
        self._times: dict[str, Any] | None = None  # when what was reported last got its values
        self._validated_yet = False

    def setup(self, trainer: RunningTrainer, module: Module, stage: str) -> None:
        """See whether this is a trial."""
        self._in_trial, self._validated = stage == "fit" and _in_trial(), False
        self._begin()
        if stage == "fit" and not self._in_trial:
            _log.warning("TuneReportCallback: this is no trial of Ray Tune; nothing is reported.")

    def on_validation_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Report, if this is the moment to."""
        if trainer.sanity_checking:
            return
        self._validated = self._validated_yet = True
        if self.on == "validation_end":
            self._report(trainer)

    def on_train_epoch_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Report, if this is the moment to."""
        if self.on == "train_epoch_end" or (self.on is None and (self._validated or not _validates(trainer))):
            self._report(trainer)
        self._validated = False

    def on_train_end(self, trainer: RunningTrainer, module: Module) -> None:
        """Say so where a name has never been logged."""
        if self._in_trial and self._times is None:
            self._values(trainer)

    def _report(self, trainer: RunningTrainer) -> None:
        if not self._in_trial or not self._news(trainer):
            return
        from ray import tune

        values = self._values(trainer)
        self._times = {name: trainer.metric_time(name) for name in trainer.callback_metrics}
        if not self.checkpoint:
            tune.report(values)
            return
        # Tune has taken its copy when `report` returns; a trial that was stopped does not return from it
        with _own_folder() as folder:
            trainer.save_checkpoint(folder, wait=True)
            tune.report(values, checkpoint=tune.Checkpoint.from_directory(folder))

    def _news(self, trainer: RunningTrainer) -> bool:
        """Whether all that was named is new; what no validation could have brought yet is waited for."""
        if self.metrics is None:
            return True
        names, there, last = self.metrics.values(), trainer.callback_metrics, self._times or {}
        if _validates(trainer) and not self._validated_yet and any(name not in there for name in names):
            return False
        times = {name: trainer.metric_time(name) for name in names}
        return all(time is None or time != last.get(name) for name, time in times.items())

    def _values(self, trainer: RunningTrainer) -> dict[str, Any]:
        there = {name: float(value) for name, value in trainer.callback_metrics.items()}
        wanted = {name: name for name in there} if self.metrics is None else self.metrics
        missing = sorted(set(wanted.values()) - set(there))
        if missing:
            late = ' What training logs for its epoch is there with on="train_epoch_end".'
            raise ConfigurationError(
                f"TuneReportCallback(metrics={list(wanted.values())}): {missing} was not logged; there are: "
                f"{', '.join(sorted(there)) or 'none'}. Call self.log(...) in the module, or report one of these."
                f"{late if self.on == 'validation_end' else ''}"
            )
        counters = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        return {**counters, **{name: there[source] for name, source in wanted.items()}}


@answers
def tune_resources(num_processes: int = 1, gpus: int = 0, num_nodes: int = 1) -> PlacementGroupFactory:
    """What a trial has to reserve for a Trainer with these arguments: give it to `ray.tune.with_resources`.

    One worker trains in the trial's own process, which is given a CPU (and a GPU). Of several, each is given a CPU (and
    a GPU) out of the trial's reservation, and the trial's own process, which only waits for them, none.

    Args:
        num_processes: CPU workers on each node.
        gpus: GPUs on each node, instead; one worker each.
        num_nodes: Nodes of a trial.

    Raises:
        ConfigurationError: Both `num_processes` and `gpus` are given, or a number is out of range.
    """
    for name, value, least in (("num_processes", num_processes, 1), ("gpus", gpus, 0), ("num_nodes", num_nodes, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigurationError(f"tune_resources({name}={value!r}): give an int of at least {least}.")
    if gpus and num_processes > 1:
        raise ConfigurationError(
            f"tune_resources(num_processes={num_processes}, gpus={gpus}): with GPUs there is one worker per GPU; drop "
            f"num_processes."
        )
    from ray.tune import PlacementGroupFactory

    workers = gpus or num_processes
    bundle = {"CPU": workers, **({"GPU": gpus} if gpus else {})}
    if workers * num_nodes == 1:
        return PlacementGroupFactory([bundle])
    return PlacementGroupFactory([{}, *[bundle] * num_nodes], strategy="STRICT_SPREAD" if num_nodes > 1 else "PACK")


@contextmanager
def _own_folder() -> Iterator[str]:
    """A new folder, which goes afterwards. That it does not is no reason for a trial to fail: Tune has its copy."""
    try:
        folder = tempfile.mkdtemp(prefix="raytrainer-")
    except OSError as error:
        raise StorageError(
            f"TuneReportCallback makes a checkpoint among temporary files before Tune takes its copy, and no "
            f"folder can be made there: {error}. Set TMPDIR to one with room, or give checkpoint=False."
        ) from error
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            _log.warning("TuneReportCallback: %s, which was for Tune, cannot be deleted: %s", folder, error)


def _validates(trainer: RunningTrainer) -> bool:
    return any(count != 0 for count in trainer.num_val_batches)


def _in_trial() -> bool:
    from ray import tune

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no trial is what is asked
        return tune.get_context().get_trial_id() is not None
