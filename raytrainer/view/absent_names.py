"""What a worker's `self.trainer` does not have, and what stands for it."""

from __future__ import annotations

from collections.abc import Iterable

from raytrainer.plan.nearest_names import did_you_mean

__all__ = ["absent"]

_INSTEAD = {
    "print": "self.print(...) of the Module",
    "device": "self.device of the Module",
    "model": "the Module itself",
    "lightning_module": "the Module itself",
    "state": "self.trainer.stage and self.trainer.running",
    "log_dict": "self.log_dict(...) of the Module",
    "save_checkpoint": "ModelCheckpoint, or Trainer.save_checkpoint in a Callback, whose hooks run on the driver",
}

#: What the Trainer itself has, on the driver.
_DRIVERS = frozenset(
    """
    about_to_validate address checkpoint_callback checkpoint_callbacks checkpoint_exists ckpt_path close
    early_stopping_callback early_stopping_callbacks enable_checkpointing enable_model_summary
    enable_progress_bar epoch_ended fit from_config idle_timeout log_metrics lr_find metric_time
    num_predict_batches num_sanity_val_batches num_test_batches peak_memory_bytes placement_timeout plot
    predict preempted preemption_exit_code preemption_grace profiler progress_bar_callback recoveries
    remove_checkpoint runtime_env scale_batch_size test time_report total_batches validate where
    """.split()  # noqa: SIM905
)


def absent(name: str, known: Iterable[str]) -> str:
    """The sentence about a name that is not among the `known` ones."""
    said = f"self.trainer has no {name!r} in a worker"
    if name in _INSTEAD:
        return f"{said}; here that is {_INSTEAD[name]}."
    if name in _DRIVERS:
        return f"{said}: the driver's Trainer has it, which the hooks of a Callback (not a WorkerCallback) are given."
    meant = did_you_mean(name, known)
    return said + (f"; {meant}" if meant else ".")
