"""Finding the largest batch size that fits into memory."""

from __future__ import annotations

import gc
import logging

import torch

from raytrainer.datamodule import DataModule
from raytrainer.driver.prepare.short_runs import MakeProbe, NoSchedulers, Probe, no_trace, run_copy
from raytrainer.driver.prepare.tuned_attribute import get_attribute, set_attribute
from raytrainer.errors import ConfigurationError, ResourceError
from raytrainer.module import Module
from raytrainer.plan.searches import SizeSearch

__all__ = ["scale_batch_size"]

log = logging.getLogger("raytrainer")


def scale_batch_size(
    make_probe: MakeProbe,
    module: Module,
    datamodule: DataModule | None,
    *,
    mode: str,
    steps_per_trial: int,
    init_val: int,
    max_trials: int,
    attribute: str,
    margin: float,
    max_val: int | None,
) -> int:
    """See `Trainer.scale_batch_size`."""
    search = SizeSearch(mode, init_val, max_trials, max_val)
    if not 0 <= margin < 1:
        raise ConfigurationError(f"scale_batch_size(margin={margin}): give a share to leave free, from 0 to below 1.")
    if steps_per_trial < 1:
        raise ConfigurationError(f"scale_batch_size(steps_per_trial={steps_per_trial}): give 1 or more.")
    before = get_attribute(attribute, datamodule, module)
    try:
        while search.size is not None:
            size = search.size
            set_attribute(attribute, size, datamodule, module)
            probe = make_probe([NoSchedulers()], [], max_steps=steps_per_trial, limit_train_batches=1.0)
            worked = _fits(probe, module, datamodule)
            log.info("scale_batch_size: %d %s", size, "works" if worked else "does not fit into memory")
            search.tell(worked, enough=probe.num_training_batches == 1)
    finally:
        set_attribute(attribute, before, datamodule, module)
    if search.best is None:
        raise ResourceError(f"scale_batch_size: no batch size from {init_val} down to 1 fits into memory.")
    best = max(1, int(search.best * (1 - margin))) if mode == "binsearch" else search.best
    set_attribute(attribute, best, datamodule, module)
    return best


def _fits(probe: Probe, module: Module, datamodule: DataModule | None) -> bool:
    """Whether a short run of a copy has enough memory."""
    try:
        with no_trace(None):
            run_copy(probe, module, None, datamodule)
        return True
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return False


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(
        words in text
        for words in ("out of memory", "cublas_status_alloc_failed", "can't allocate memory", "not enough memory")
    )
