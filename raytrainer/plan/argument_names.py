"""Arguments that there are not: what was probably meant, or what stands for it here."""

from __future__ import annotations

from collections.abc import Iterable

from raytrainer.plan.nearest_names import did_you_mean, nearly

__all__ = ["ELSEWHERE", "may_be_handed_on", "unknown_argument"]

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
    **dict.fromkeys(
        ("early_stopping", "early_stop", "early_stop_callback", "early_stopping_patience", "patience"),
        "callbacks=[raytrainer.EarlyStopping(...)]",
    ),
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

#: Likewise of other classes, and of a Trainer's verbs.
_FIT = {
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs"), "Trainer(max_epochs=...)"),
    **dict.fromkeys(("callbacks", "logger", "max_steps", "gpus", "precision"), "that is the Trainer's"),
    **dict.fromkeys(("resume_from_checkpoint", "resume", "checkpoint", "checkpoint_path"), "ckpt_path="),
    **dict.fromkeys(("config", "train_loop_config"), "arguments of your Module's and DataModule's __init__"),
    "datasets": "one at a time: fit(model, RayDataset(train), RayDataset(val))",
    **dict.fromkeys(("train_loader", "train_dataset", "train_data", "loader", "data"), "train_dataloaders="),
    **dict.fromkeys(("val_loader", "val_dataset", "val_data", "valid_dataloaders"), "val_dataloaders="),
    "dataloaders": "train_dataloaders= and val_dataloaders=",
    **dict.fromkeys(("dm", "data_module"), "datamodule="),
}
_EVALUATE = {
    **dict.fromkeys(("loader", "data", "dataset", "val_loader", "test_loader", "val_dataloaders", "test_dataloaders"),
                    "dataloaders="),
    **dict.fromkeys(("checkpoint", "checkpoint_path", "resume_from_checkpoint"), "ckpt_path="),
    **dict.fromkeys(("dm", "data_module"), "datamodule="),
}  # fmt: skip
_ONE_STRATEGY = {
    **dict.fromkeys(("accelerator", "parallel_devices", "devices"), "Trainer(gpus=...) or Trainer(num_processes=...)"),
    **dict.fromkeys(("cluster_environment", "start_method"), "nothing: workers are Ray actors"),
    "checkpoint_io": "nothing: checkpoints go to any path or URI, in the background",
    **dict.fromkeys(("precision_plugin", "mixed_precision"), "Trainer(precision=...)"),
    "process_group_backend": "NCCL on GPUs, gloo on CPUs",
    **dict.fromkeys(("timeout", "timeout_s"), "process_group_timeout="),
}
_DDP = {
    **_ONE_STRATEGY,
    **dict.fromkeys(("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper"), 'gradient_compression="bf16" or "fp16"'),
    "model_averaging_period": "nothing: gradients are averaged in every step",
}
_FSDP = {
    **_ONE_STRATEGY,
    **dict.fromkeys(("auto_wrap_policy", "ignored_parameters", "modules_to_wrap"), "blocks="),
    "activation_checkpointing_policy": "activation_checkpointing=True, for the blocks",
    "sharding_strategy": 'reshard_after_forward= (False: SHARD_GRAD_OP), replicate="nodes" (HYBRID_SHARD)',
    "state_dict_type": "nothing: checkpoints are in shards, and go on at any number of workers",
    "device_mesh": "replicate=, or ModelParallel(tensor=..., data=...)",
}
_PROFILER = dict.fromkeys(("dirpath", "filename"), "reports go to profile/ in the log directory")
_OF_OTHERS: dict[str, dict[str, str]] = {
    "Trainer": ELSEWHERE,
    "fit": _FIT,
    **dict.fromkeys(("validate", "test", "predict"), _EVALUATE),
    **dict.fromkeys(("DDP", "DDP2", "DP"), _DDP),
    "FSDP": _FSDP,
    "ModelParallel": {
        **_FSDP,
        "data_parallel_size": "data=",
        "tensor_parallel_size": "tensor=",
        "save_distributed_checkpoint": "nothing: checkpoints are in shards",
    },
    "ModelCheckpoint": {
        "filepath": "dirpath= and filename=",
        **dict.fromkeys(("period", "every_n_val_epochs"), "every_n_epochs="),
        "prefix": "filename=",
        **dict.fromkeys(("num_to_keep", "save_total_limit", "max_to_keep"), "save_top_k="),
        **dict.fromkeys(("checkpoint_score_attribute", "metric"), "monitor="),
        "checkpoint_score_order": "mode=",
        "checkpoint_frequency": "every_n_epochs= or every_n_train_steps=",
        "checkpoint_at_end": "save_last=",
        "save_best_only": "monitor= and save_top_k=1",
    },
    "EarlyStopping": {
        "log_rank_zero_only": "nothing: it runs on the driver, once",
        "restore_best_weights": "trainer.checkpoint_callback.best_model_path, and Module.load_from_checkpoint",
        "metric": "monitor=",
    },
    "ProgressBar": {
        **dict.fromkeys(("theme", "console_kwargs", "process_position"), "nothing: bars fit the terminal"),
    },
    "TuneReportCallback": {"filename": "checkpoint=True", "save_checkpoints": "checkpoint="},
    "CSVLogger": {"prefix": "name="},
    "WandbLogger": {
        "offline": 'mode="offline"',
        "dir": "save_dir=",
        "version": "id=",
        "log_model": "nothing: upload what ModelCheckpoint saves",
        "experiment": "id=, which goes on with a run",
        **dict.fromkeys(("anonymous", "checkpoint_name", "add_file_policy"), "nothing"),
    },
    "MLFlowLogger": {
        "save_dir": "tracking_uri=, a folder",
        "log_model": "nothing: upload what ModelCheckpoint saves",
        "artifact_location": "nothing: the experiment has it",
        "synchronous": "nothing: loggers never hold training up",
    },
    "ThroughputMonitor": {"batch_size_fn": "samples=", "length_fn": "tokens="},
    "LearningRateFinder": {"num_training_steps": "num_training="},
    "TensorBoardLogger": {
        "log_graph": "trainer.logger.experiment.add_graph(...)",
        "sub_dir": "version=, which may be a text",
        "log_dir": "save_dir=",
        "flush_secs": "nothing: it flushes where the run does",
    },
    "SimpleProfiler": {**_PROFILER, "extended": "nothing: the table has all hooks"},
    "AdvancedProfiler": {**_PROFILER, "line_count_restriction": "lines="},
    "PyTorchProfiler": {**_PROFILER, "schedule": "wait=, warmup=, active= and repeat="},
    "RayDataset": {
        "ds": "dataset=",
        "prefetch": "prefetch_batches=",
        **dict.fromkeys(("local_shuffle_buffer_size", "local_shuffle_seed"), "shuffle=, which may be a window's rows"),
    },
    "tune_resources": {
        **dict.fromkeys(("num_workers", "cpu", "CPU"), "num_processes="),
        **dict.fromkeys(("use_gpu", "gpu", "GPU"), "gpus="),
    },
}


def may_be_handed_on(owner: str, name: str, known: Iterable[str]) -> bool:
    """Whether a name is for the library that `owner` hands on what it does not know to: it is like none of its own."""
    return name not in _OF_OTHERS.get(owner, {}) and not nearly(name, known, cutoff=0.8)


def unknown_argument(owner: str, name: str, known: Iterable[str]) -> str:
    """The sentence about an argument that `owner` does not have: what stands for it, the nearest name, or all names."""
    names = list(known)
    if name in (elsewhere := _OF_OTHERS.get(owner, {})):
        return f"{owner} has no argument {name!r}. Here: {elsewhere[name]}."
    there = f"there are {', '.join(names)}." if names else "it takes none."
    return f"{owner} has no argument {name!r}: {did_you_mean(name, names) or there}"
