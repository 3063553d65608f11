"""Log how many samples and tokens a second are trained on, and how well the hardware is used."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from raytrainer.callbacks._without_logger import warn_without_logger
from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.data.batch_size import first_batch_size
from raytrainer.errors import ConfigurationError
from raytrainer.gpu.peak import peak_flops
from raytrainer.plan import argument_checks as checks
from raytrainer.private.torch_private import is_compiled

if TYPE_CHECKING:
    from raytrainer.module import Module
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["ThroughputMonitor"]

log = logging.getLogger("raytrainer")


class ThroughputMonitor(WorkerCallback):
    """On logging steps of training, gives the loggers rates since the logging step before.

    Of all workers together: `throughput/samples_per_second/sum`, `throughput/batches_per_second/sum` and, with
    `tokens`, `throughput/tokens_per_second/sum`. With `flops_per_batch`, `throughput/flops_per_second/sum` and
    `throughput/mfu/mean`, the share of the devices' peak (model FLOPs utilisation, Chowdhery et al., 2022, 2204.02311).
    Waiting for data counts; validations and the run's first batch do not.

    Args:
        samples: Samples in a batch; None: the first dimension of its first tensor.
        tokens: Tokens in a batch, for tokens per second.
        flops_per_batch: Floating-point operations of the model's forward and backward pass of one worker's batch (with
            layers that are split, those of all workers that split them): a number, a function of the batch, or
            "measure" to count those of the run's first batch (matrix products, convolutions and attention, by
            `torch.utils.flop_counter`).
        peak_flops: What one worker's device can do a second; None: known for some GPUs, by name and precision.

    Raises:
        ConfigurationError: An argument is out of range; "measure" with `compile`, or a part that is compiled.
    """

    def __init__(
        self,
        samples: Callable[[Any], int] | None = None,
        tokens: Callable[[Any], int] | None = None,
        flops_per_batch: float | str | Callable[[Any], float] | None = None,
        peak_flops: float | None = None,
    ) -> None:
        for name, function in (("samples", samples), ("tokens", tokens)):
            if function is not None and not callable(function):
                raise ConfigurationError(f"ThroughputMonitor({name}={function!r}): give a function of the batch.")
        if not callable(flops_per_batch) and flops_per_batch != "measure":
            checks.number("ThroughputMonitor(flops_per_batch)", flops_per_batch, above=0.0)
        self.samples, self.tokens, self.flops_per_batch = samples or first_batch_size, tokens, flops_per_batch
        self.peak_flops = checks.number("ThroughputMonitor(peak_flops)", peak_flops, above=0.0)
        self._peak: float | None = None
        self._counter: FlopCounterMode | None = None  # while the first batch is counted
        self._measured: float | None = None
        self._clock = self._paused = 0.0
        self._sums: dict[str, float] = {}

    def setup(self, trainer: TrainerView, module: Module, stage: str) -> None:
        """Say so if there is no logger."""
        warn_without_logger("ThroughputMonitor", trainer, "nobody sees its values")

    def on_train_start(self, trainer: TrainerView, module: Module) -> None:
        """Have the rates logged."""
        compiled = [name or type(module).__name__ for name, part in module.named_modules() if is_compiled(part)]
        if trainer.settings.compile is not None:
            compiled.insert(0, "Trainer(compile=...)")
        if self.flops_per_batch == "measure" and compiled:
            raise ConfigurationError(
                f'ThroughputMonitor(flops_per_batch="measure") with {compiled[0]} compiled: compiled code cannot be '
                "counted, and code that is counted is never compiled; give the number."
            )
        self._peak = self.peak_flops
        if self._peak is None and module.device.type == "cuda":
            name = torch.cuda.get_device_name(module.device)
            self._peak = peak_flops(name, trainer.precision, torch.get_float32_matmul_precision())
        if self._peak is None and self.flops_per_batch is not None:
            log.warning("ThroughputMonitor: the peak of %s is not known; give peak_flops for MFU.", module.device)
        self._measured, self._clock, self._sums = None, 0.0, {}
        trainer.samplers.append(self._sample)

    def on_train_batch_start(self, trainer: TrainerView, module: Module, batch: Any, batch_idx: int) -> None:
        """Count the first batch's operations."""
        if self.flops_per_batch == "measure" and self._measured is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch up."""
        if self._counter is not None:
            self._measured = float(self._counter.get_total_flops())
            self._stop_counting()
        if not self._clock:
            self._clock = time.perf_counter()  # the first batch, with all that is started by it, does not count
            return
        self._add("samples", self.samples(batch))
        self._add("batches", 1)
        if self.tokens is not None:
            self._add("tokens", self.tokens(batch))
        flops = self._measured if self.flops_per_batch == "measure" else self.flops_per_batch
        if flops is not None:
            self._add("flops", flops(batch) if callable(flops) else float(flops))

    def on_validation_start(self, trainer: TrainerView, module: Module) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: TrainerView, module: Module) -> None:
        """Go on."""
        if self._clock:
            self._clock += time.perf_counter() - self._paused

    def on_exception(self, trainer: TrainerView, module: Module, exception: BaseException) -> None:
        """Count no more."""
        self._stop_counting()

    def _stop_counting(self) -> None:
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.__exit__(None, None, None)

    def _add(self, name: str, count: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + count

    def _sample(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds, sums = max(now - self._clock, 1e-9), self._sums
        self._clock, self._sums = now, {}
        values = {f"throughput/{name}_per_second/sum": count / seconds for name, count in sums.items()}
        if self._peak is not None and "flops" in sums:
            values["throughput/mfu/mean"] = sums["flops"] / seconds / self._peak
        return values
