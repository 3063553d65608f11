"""Names of arguments that a Trainer does not have: what was probably meant, or what stands for it here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ELSEWHERE", "EXPORTED", "STRATEGIES_ELSEWHERE", "unknown_argument"]

_GPUS = "gpus=2, gpus=-1 (all) or gpus=[0, 3] trains on GPUs, num_processes=2 in processes on CPUs"
_ACCELERATOR = f"leave it out to train on this CPU; {_GPUS}"
_CHECKPOINTS = "callbacks=[raytrainer.ModelCheckpoint(...)] says when to save and what to keep"
_LOADER = "that belongs to your loader: write it in train_dataloader()"
_OPTIMIZER = "what configure_optimizers() of your Module returns decides that"
_BAR = "callbacks=[raytrainer.ProgressBar(...)]"

#: Arguments of other trainers, and what a user of theirs writes here: Lightning's (of 2.x and of 1.x), Ray Train's.
ELSEWHERE = {
    # Lightning 2.x
    "accelerator": _ACCELERATOR,
    "devices": _ACCELERATOR,
    "barebones": "logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False",
    "enable_autolog_hparams": "hyperparameters are logged where a Module calls self.save_hyperparameters(logger=True)",
    "model_registry": "there is none here: upload what ModelCheckpoint saves",
    "plugins": "strategy=raytrainer.DDP(...) and precision= are what can be chosen",
    # Lightning 1.x
    "amp_backend": 'precision=16 or "bf16", by torch\'s own autocast',
    "amp_level": 'precision=16 or "bf16", by torch\'s own autocast',
    "auto_lr_find": "trainer.lr_find(model), or callbacks=[raytrainer.LearningRateFinder()]",
    "auto_scale_batch_size": "trainer.scale_batch_size(model), or callbacks=[raytrainer.BatchSizeFinder()]",
    "auto_select_accelerator": _GPUS,
    "checkpoint_callback": _CHECKPOINTS,
    "distributed_backend": 'strategy="ddp"',
    "flush_logs_every_n_steps": "that belongs to the logger",
    "ipus": _GPUS,
    "log_save_interval": "that belongs to the logger",
    "move_metrics_to_cpu": "metrics leave the GPU by themselves",
    "multiple_trainloader_mode": _LOADER,
    "prepare_data_per_node": "set it on the DataModule",
    "process_position": _BAR,
    "progress_bar_refresh_rate": _BAR,
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs=1",
    "replace_sampler_ddp": "use_distributed_sampler=",
    "resume_from_checkpoint": "trainer.fit(model, ckpt_path=...)",
    "row_log_interval": "log_every_n_steps=",
    "stochastic_weight_avg": "callbacks=[raytrainer.StochasticWeightAveraging(...)]",
    "terminate_on_nan": "detect_anomaly=True, or EarlyStopping(check_finite=True)",
    "tpu_cores": _GPUS,
    "track_grad_norm": "log it in on_before_optimizer_step, by torch.nn.utils.get_total_norm",
    "truncated_bptt_steps": "split the sequence in training_step, with manual optimization",
    "weights_save_path": _CHECKPOINTS,
    "weights_summary": "callbacks=[raytrainer.ModelSummary(max_depth=...)]",
    # the user's notes, and a name that is one letter away from two others
    "check_val_every_n_epochs": "check_val_every_n_epoch=",
    # what loops of one's own, and transformers' TrainingArguments, call it
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "num_train_epochs"), "max_epochs="),
    **dict.fromkeys(("device", "cuda", "num_gpus", "n_gpus"), _GPUS),
    **dict.fromkeys(("fp16", "bf16", "amp", "mixed_precision"), 'precision=16 or "bf16"'),
    **dict.fromkeys(("output_dir", "log_dir", "save_dir", "logging_dir"), "default_root_dir="),
    **dict.fromkeys(("max_grad_norm", "clip_grad_norm", "grad_clip"), "gradient_clip_val="),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulation_steps"), "accumulate_grad_batches="),
    **dict.fromkeys(("lr", "learning_rate", "optimizer", "scheduler", "lr_scheduler"), _OPTIMIZER),
    **dict.fromkeys(("batch_size", "shuffle"), _LOADER),
    "early_stopping": "callbacks=[raytrainer.EarlyStopping(...)]",
    "resume": "trainer.fit(model, ckpt_path=...)",
    "ckpt_path": "trainer.fit(model, ckpt_path=...)",
    # Ray Train
    "checkpoint_config": _CHECKPOINTS,
    "datasets": "hand a RayDataset to fit, or write train_dataset() in a DataModule",
    "dataset_config": "hand a RayDataset to fit, or write train_dataset() in a DataModule",
    "failure_config": "max_failures=",
    "metadata": "on_save_checkpoint(self, checkpoint) in the Module adds to a checkpoint",
    "num_workers": "num_processes=2 trains in processes on CPUs, gpus=2 on GPUs; a loader's num_workers is its own",
    "placement_strategy": "num_nodes= and gpus= say where workers go",
    "resources_per_worker": "a worker has one CPU, and one GPU where gpus= is given",
    "run_config": "default_root_dir=, callbacks=[raytrainer.ModelCheckpoint(...)], max_failures=",
    "scaling_config": _GPUS + ", num_nodes=2 on two nodes",
    "storage_path": "default_root_dir=, or raytrainer.ModelCheckpoint(dirpath=...) for a URI",
    "torch_config": "strategy=raytrainer.DDP(process_group_timeout=...)",
    "train_loop_config": "arguments of your Module",
    "train_loop_per_worker": "write training_step in a raytrainer.Module",
    "trainer_resources": "the driver is your own process and reserves nothing",
    "use_gpu": _GPUS,
}

#: What other packages export, and what it is here.
EXPORTED = {
    "LightningModule": "raytrainer.Module",
    "LightningDataModule": "raytrainer.DataModule",
    **dict.fromkeys(("TQDMProgressBar", "RichProgressBar"), "raytrainer.ProgressBar"),
    "Tuner": "trainer.lr_find(model) and trainer.scale_batch_size(model)",
    **dict.fromkeys(("DDPStrategy", "TorchTrainer", "ScalingConfig"), 'raytrainer.Trainer(strategy="ddp", gpus=...)'),
    "FSDPStrategy": "raytrainer.FSDP",
    "ModelParallelStrategy": "raytrainer.ModelParallel",
    "LightningEnvironment": "nothing: workers are Ray actors",
}

#: Names of Lightning's strategies, and what to write.
STRATEGIES_ELSEWHERE = {
    "ddp_find_unused_parameters_true": "strategy=raytrainer.DDP(find_unused_parameters=True)",
    "ddp_find_unused_parameters_false": 'strategy="ddp"',
    **dict.fromkeys(("ddp_notebook", "ddp_fork", "ddp_notebook_find_unused_parameters_false"), 'strategy="ddp"'),
    "ddp_notebook_find_unused_parameters_true": "strategy=raytrainer.DDP(find_unused_parameters=True)",
    "single_device": 'strategy="local"',
    "fsdp_cpu_offload": "strategy=raytrainer.FSDP(cpu_offload=True)",
    **dict.fromkeys(("deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"), 'strategy="fsdp"'),
    **dict.fromkeys(
        ("deepspeed_stage_2_offload", "deepspeed_stage_3_offload"), "strategy=raytrainer.FSDP(cpu_offload=True)"
    ),
}


def unknown_argument(owner: str, name: str, known: Iterable[str]) -> str:
    """The sentence about an argument that `owner` does not have: what stands for it, the nearest name, or all names."""
    names = list(known)
    if owner == "Trainer" and name in ELSEWHERE:
        return f"{owner} has no argument {name!r}. Here: {ELSEWHERE[name]}."
    close = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}."
    return f"{owner} has no argument {name!r}: {meant}"
