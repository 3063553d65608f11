"""What a worker's `self.trainer` does not have, and what stands for it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["absent"]

_INSTEAD = {
    "is_last_batch": "batch_idx + 1 == self.trainer.num_training_batches, where the loader's length is known",
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
    about_to_validate address auto_select_gpus benchmark check_val_every_n_epoch checkpoint_callback
    checkpoint_callbacks checkpoint_exists ckpt_path close compile detect_anomaly deterministic
    early_stopping_callback early_stopping_callbacks enable_checkpointing enable_model_summary
    enable_progress_bar epoch_ended evaluating fit float32_matmul_precision from_config gpus hang_timeout
    idle_timeout inference_mode limit_predict_batches limit_test_batches limit_train_batches limit_val_batches
    log_dir log_gpu_memory log_metrics lr_find max_failures max_time metric_time num_predict_batches
    num_processes num_sanity_val_batches num_sanity_val_steps num_test_batches overfit_batches peak_memory_bytes
    placement_timeout plot predict preempted preemption_exit_code preemption_grace profiler
    progress_bar_callback recoveries reload_dataloaders_every_n_epochs remove_checkpoint runtime_env
    scale_batch_size seed snapshot_every spares sync_batchnorm test time_report total_batches
    use_distributed_sampler val_check_interval validate where worker_output
    """.split()  # noqa: SIM905
)


def absent(name: str, known: Iterable[str]) -> str:
    """The sentence about a name that is not among the `known` ones."""
    said = f"self.trainer has no {name!r} in a worker"
    if name in _INSTEAD:
        return f"{said}; here that is {_INSTEAD[name]}."
    if name in _DRIVERS:
        return f"{said}: the driver's Trainer has it, which the hooks of a Callback (not a WorkerCallback) are given."
    close = difflib.get_close_matches(name, [known_one for known_one in known if not known_one.startswith("_")], n=1)
    return said + (f"; did you mean {close[0]!r}?" if close else ".")
