"""What becomes of Lightning's names that are not simply the same here, for `lightning_comparison.py`."""

from __future__ import annotations

__all__ = ["HEAD", "NEW", "RENAMED", "WORDS"]

HEAD = """\
# Lightning's names, one by one

Lightning VERSION against this package. A name that is called the same does the same, unless its row says otherwise;
[coming from Lightning](from-lightning.md) has a port as an example. Made by `python tests/lightning_comparison.py` from
both packages, and tested against what is exported. Environment variables `PL_TRAINER_...` are not read; the
[command line](command-line.md) takes the Trainer's arguments.
"""

_WORKERS = "in workers, on `self.trainer`, a view of the run"
_UNUSED = "`rt.DDP(find_unused_parameters=True)`, or False"
_DDP = '`"ddp"`: workers are actors, which neither fork nor pickle your script'
_ONNX = "none: it is a `torch.nn.Module`, which `torch.onnx.export` and the like take"
_ELSEWHERE = "none; no such hardware is supported"
_KEYS = "none; hyperparameters are `hyper_parameters` in a checkpoint, with how `__init__` takes them beside"
_FILES = "reports go to the logger's folder, one file a worker"

WORDS: dict[str, dict[str, str]] = {
    "Trainer arguments": {
        "accelerator": "`gpus=2`, `gpus=[0, 2]`, `gpus=-1`; `num_processes=2` for CPUs. No TPU, no MPS",
        "devices": "as `accelerator`",
        "barebones": "none; switch off what you do not want",
        "enable_autolog_hparams": "none; `save_hyperparameters(logger=False)`",
        "model_registry": "none",
        "plugins": "none; Ray is the cluster environment, `precision` and checkpoints are not replaceable",
        "strategy": "a name (see Strategies) or settings such as `rt.DDP(...)`",
        "num_nodes": "the same, or a pair for elastic runs; the script is started once, not on each node",
        "precision": 'the same, less `"transformer-engine"`',
        "min_epochs": "1, not none: a stop asked for in the first epoch waits for its end; 0 stops at once",
        "max_time": "counts the `fit` in progress, also one that goes on from a checkpoint, rather than all of them",
        "max_steps": "the run ends exactly there, whatever `max_epochs` says, rather than at whichever comes first",
        "val_check_interval": "the same, counted in batches; an interval of time is an error",
        "logger": "the same; loggers live on the driver",
        "callbacks": "`Callback`s run on the driver, `WorkerCallback`s beside the module; none by entry points",
        "profiler": "the same names; one file a worker",
        "num_sanity_val_steps": "the same; leaves no metric and no trace in generators, for which a `val_dataloader` "
        "that draws random numbers is called once more; skipped when resuming; the attribute stays -1",
        "enable_checkpointing": "the same; False leaves out the default one: a `ModelCheckpoint` that is given saves",
        "reload_dataloaders_every_n_epochs": "the same; validation loaders are made as training begins, and "
        "anew at the first validation after n, 2n, ... epochs",
        "use_distributed_sampler": "the same; an evaluation never counts a sample twice",
        "min_steps": "the same; once it is reached, `min_epochs` no longer counts, rather than both",
        "check_val_every_n_epoch": "the same; the validation before a stop that was asked for comes in any epoch",
        "log_every_n_steps": "the same, and counts the batches of an evaluation over all its loaders too; a value is "
        "in the rows of those steps only that have logged it, and a request to stop adds no row",
        "overfit_batches": "the same; not together with `limit_train_batches` or `limit_val_batches`",
    },
    "Trainer": {
        "is_global_zero": "True on the driver; a worker's own is on `self.trainer`",
        "global_rank": "0 on the driver; a worker's own is on `self.trainer`",
        **dict.fromkeys(("local_rank", "node_rank"), "in workers only, on `self.trainer`"),
        **dict.fromkeys(
            (
                "estimated_stepping_batches", "lr_scheduler_configs", "num_devices", "optimizers",
                "predict_dataloaders", "test_dataloaders", "train_dataloader", "val_dataloaders",
            ),
            _WORKERS,
        ),
        **dict.fromkeys(
            (
                "device_ids", "distributed_sampler_kwargs", "enable_validation", "init_module", "precision_plugin",
                "scaler",
            ),
            "none",
        ),
        "received_sigterm": "`preempted`",
        "interrupted": "by Ctrl-C, after which `fit` returns rather than ending the program, or SIGTERM; of a run that "
        "has failed, `state.status` is `\"failed\"`",
        "is_last_batch": "in workers, on `self.trainer`; of training",
        "print": "`self.print` of a Module",
        "fit": "the same, but each call begins at epoch 0, with the weights that there are, rather than where the last "
        "one of this Trainer ended; `ckpt_path` may also be a file of Lightning's, or Ray's object for a checkpoint; "
        "an epoch for which a training loader of unknown length gives no batch is an error; what is drawn depends on "
        "the seed and the epoch, not on what this process has drawn before",
        "predict": "the same; lazy on Ray Datasets",
        "callback_metrics": "the same; values are float64, or int64 where that would round. Over several workers a "
        "Module sees its own step values, also with `sync_dist`, and its own of what a hook at an epoch's end logs, "
        "until that hook has ended",
        "current_epoch": "the same, but an epoch that the run ends within is not counted at the end: another run may "
        "go on with it",
        "global_step": "the same; when resuming, right from `on_fit_start` on",
        "validate": "the same; without a model, and with no best checkpoint, the weights at the end of `fit`",
        "test": "as `validate`",
        "save_checkpoint": "makes a directory; `wait=True` returns when it is written; of a `fit` that has failed "
        "there is nothing left to save afterwards, see `save_on_exception`",
        "ckpt_path": "the same; not to be set; `\"last\"` is the newest one, whatever its name; addresses on the web "
        "are not read",
    },
    "LightningModule": {
        **dict.fromkeys(
            (
                "CHECKPOINT_HYPER_PARAMS_KEY", "CHECKPOINT_HYPER_PARAMS_NAME", "CHECKPOINT_HYPER_PARAMS_TYPE",
            ),
            _KEYS,
        ),
        **dict.fromkeys(("example_input_array", "to_onnx", "to_tensorrt", "to_torchscript"), _ONNX),
        **dict.fromkeys(("configure_sharded_model", "fabric", "on_gpu"), "none"),
        "device_mesh": "the same, with `rt.ModelParallel` and `rt.FSDP`; with copies, \"replicate\" is first",
        "remove_ignored_hparams": "`save_hyperparameters(ignore=...)` does it, also for what a base class has saved",
        "trainer": "a view of the run while it lasts; then the Trainer, or the one that was set",
        "logger": "passes `log_...` calls on to the loggers, which are on the driver; there is no `logger.experiment`",
        "loggers": "`logger` in a list",
        "log": "the same; epoch values are reduced over workers without `sync_dist`; `on_step=False` alone means "
        "`on_epoch=True`, and both False is an error; `reduce_fx` may be any function of the values",
        "configure_optimizers": "the same; the `frequency` of a scheduler with `interval=\"step\"` counts optimizer "
        "steps, over epochs, and one that waits for a metric acts on each value once; unknown keys are errors",
        "load_from_checkpoint": "the same, Lightning's own files too. Values have their types without "
        "unpickling, which is done only for a file of Lightning's with `weights_only=False`; weights go to the CPU "
        "unless `map_location` says otherwise; an argument that `__init__` does not take is left out with a warning",
        **dict.fromkeys(
            ("training_step", "validation_step", "test_step", "predict_step"),
            "the same; `dataloader_idx` may be asked for with one loader too, `dataloader_iter` may not; with manual "
            "optimization anything may be returned",
        ),
        "train_dataloader": "the same; `CombinedLoader` may be of mode `\"sequential\"`",
        "save_hyperparameters": "the same; a child made in its parent's `__init__` has its own arguments only",
    },
    "LightningDataModule": {
        **dict.fromkeys(
            (
                "CHECKPOINT_HYPER_PARAMS_KEY", "CHECKPOINT_HYPER_PARAMS_NAME", "CHECKPOINT_HYPER_PARAMS_TYPE",
            ),
            _KEYS,
        ),
        "name": "none; `str(datamodule)` has its class and arguments, not the sizes of loaders, which workers "
        "make",
        "on_exception": "the same; on other processes, of what fails in that worker",
        "remove_ignored_hparams": "`save_hyperparameters(ignore=...)`",
    },
    "Callback": {
        "on_train_batch_start": "of a `WorkerCallback`, as are all hooks around batches, backward and optimizers",
        "teardown": "the same; also called when a run has failed",
    },
    "Callbacks": {
        "Checkpoint": "none; derive from `ModelCheckpoint`",
        "ModelCheckpoint": "what a step asks for that ends an epoch or comes before a validation is saved after that, "
        "with its metrics; a monitored metric must be new and of the very weights; one that training logs is looked at "
        "after epochs; every n steps means when n is reached or passed; `last.ckpt` is written whenever a checkpoint "
        'could be, and at the end; `save_last="link"` does as True; `current_score` is that of the last look; '
        "with `save_top_k=-1` each checkpoint has a name of its own, by version",
        "ModelPruning": "none; `torch.nn.utils.prune` in a `WorkerCallback`'s `on_train_epoch_end`",
        "RichProgressBar": "`ProgressBar`, which is made with rich",
        "TQDMProgressBar": "`ProgressBar`",
        "SpikeDetection": "raises a `TrainingSpikeError`, as soon as one worker's loss has a spike",
        "WeightAveraging": "averages are on the module's device unless `device` says otherwise; the functions are "
        "`avg_fn` and `multi_avg_fn`",
        "Callback": "runs on the driver; beside the module, and around batches, `WorkerCallback`",
        "LambdaCallback": "takes hooks by keyword, likewise; those around batches go into `LambdaWorkerCallback`",
        "EarlyStopping": "looks at new values only; at a metric that training logs after epochs; its "
        "`stopping_reason` is a string: "
        '`"none"`, `"patience"`, `"not_finite"`, `"stopping_threshold"`, `"divergence_threshold"`',
        "LearningRateFinder": "results are in `optimal_lr`, and in `result`",
        "LearningRateMonitor": "rates are logged with `self.log`: those of an epoch stand in the row of its end; "
        "without a logger it warns",
        "Timer": "the same; a sanity check has a clock of its own, `\"sanity\"`; `max_time` makes none",
        "BatchSizeFinder": "the same; without `margin` and `max_val`, no size is left out",
        "BaseFinetuning": "no `filter_params`: `unfreeze_and_add_param_group` does it",
        "StochasticWeightAveraging": "averages are on the module's device unless `device` says otherwise; they are "
        "taken as epochs end, the last one's too, rather than as they begin; `swa_epoch_start` counts from 0, not 1",
        "EMAWeightAveraging": "averages are on the module's device unless `device` says otherwise; "
        "`update_every_n_steps=n` updates after steps n, 2n, ..., rather than 1, n + 1, ..., and "
        "`update_starting_at_step=n` after step n, rather than n + 1; the module's `on_validation_epoch_end` sees them",
        "ThroughputMonitor": "counts samples by itself; without a logger it warns",
        "DeviceStatsMonitor": "without a logger it warns",
    },
    "Loggers": {
        "CometLogger": "none; derive from `Logger`",
        "LitLogger": "none; derive from `Logger`",
        "CSVLogger": "hyperparameters go to `hparams.json`, not a `hparams.yaml`; `hparams_file` reads both; the "
        "folder is called `logs`",
        "TensorBoardLogger": "hyperparameters go to TensorBoard's table alone, not to a `hparams.yaml` too; the folder "
        "is called `logs`; `default_hp_metric` is False unless given",
        "WandbLogger": "further arguments go to `wandb.init`",
        "MLFlowLogger": "checkpoints are not uploaded",
    },
    "Profilers": {
        "PassThroughProfiler": "`profiler=None`",
        "XLAProfiler": _ELSEWHERE,
        "Profiler": _FILES,
        "AdvancedProfiler": _FILES,
        "PyTorchProfiler": _FILES,
        "SimpleProfiler": _FILES,
    },
    "Tuning": {
        "lr_find": "a method of the Trainer; other rates by a documented rule; also with `fast_dev_run`",
        "scale_batch_size": "a method of the Trainer; also with `fast_dev_run`; without `margin` and `max_val`, no "
        "size is left out",
    },
    "Strategies": {
        "ddp_spawn": _DDP,
        **dict.fromkeys(("ddp_fork", "ddp_notebook"), _DDP),
        **dict.fromkeys(
            (
                "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true",
                "ddp_fork_find_unused_parameters_false", "ddp_fork_find_unused_parameters_true",
                "ddp_notebook_find_unused_parameters_false", "ddp_notebook_find_unused_parameters_true",
                "ddp_spawn_find_unused_parameters_false", "ddp_spawn_find_unused_parameters_true",
            ),
            _UNUSED,
        ),
        **dict.fromkeys(
            (
                "deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload", "deepspeed_stage_3",
                "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme",
            ),
            "none",
        ),
        "fsdp": "torch's FSDP2; settings: `rt.FSDP(...)`",
        "fsdp_cpu_offload": "none; see `rt.FSDP`",
        "single_device": '`"local"`',
        **dict.fromkeys(("single_tpu", "single_xla", "xla", "xla_debug"), _ELSEWHERE),
    },
}  # fmt: skip

_DATASETS = "a Ray Dataset in place of a loader"

NEW: dict[str, dict[str, str]] = {
    "Trainer arguments": dict.fromkeys(
        (
            "address", "auto_select_gpus", "compile", "float32_matmul_precision", "gpus", "hang_timeout",
            "idle_timeout", "log_gpu_memory", "max_failures", "num_processes", "placement_timeout",
            "preemption_exit_code", "preemption_grace", "runtime_env", "seed", "snapshot_every", "spares",
            "worker_output",
        ),
        "see [its meaning](trainer-arguments.md)",
    ),
    "Trainer": {
        "checkpoint_exists": "whether a whole checkpoint is there",
        "remove_checkpoint": "delete one",
        "close": "release the workers now",
        "from_config": "a Trainer from plain values",
        "log_metrics": "give the loggers a value from a driver's callback",
        "lr_find": "as of Lightning's `Tuner`",
        "scale_batch_size": "as of Lightning's `Tuner`",
        "peak_memory_bytes": "most memory of each worker's GPU",
        "plot": "metrics over steps, as a figure",
        "preempted": "whether SIGTERM ended the run",
        "recoveries": "failures that the run has recovered from",
        "settings": "the validated settings",
        "skipped_steps": "steps left out for infinite gradients",
        "about_to_validate": "whether a validation follows at once",
        "epoch_ended": "whether the epoch has no batch left",
        "metric_time": "when a metric got its value",
        "total_batches": "training batches of all epochs so far",
        "time_report": "what the time of a fit went to",
        "where": "where runs go",
        "datamodule": "an attribute in Lightning too",
        "should_stop": "an attribute in Lightning too; in a worker, `self.trainer.should_stop` tells what the driver "
        "was asked for, from the next batches, evaluation or epoch on",
        "state": "an attribute in Lightning too; its fields are strings",
    },
    "LightningModule": {
        **dict.fromkeys(("train_dataset", "val_dataset", "test_dataset", "predict_dataset"), _DATASETS),
        **dict.fromkeys(
            ("training_step_end", "validation_step_end", "test_step_end"),
            "sees a node's outputs, with gradients, as in older releases",
        ),
        "export_weights": "the state dict alone, also as safetensors",
        "hyperparameters_to_save": "what a checkpoint holds of them",
    },
    "LightningDataModule": {
        **dict.fromkeys(("train_dataset", "val_dataset", "test_dataset", "predict_dataset"), _DATASETS),
        "hyperparameters_to_save": "what a checkpoint holds of them",
        "trainer": "an attribute in Lightning too",
    },
    "Callback": {
        "log": "in Lightning set when a run begins; of a `WorkerCallback` only",
        "log_dict": "likewise",
        "every_n_train_steps": "ask for a call exactly there",
        "runs_last": "whether it comes after all others",
        "on_train_chunk_end": "about once a second of training, on the driver",
        "on_evaluation_chunk_end": "likewise of an evaluation",
    },
    "Callbacks": {
        "WorkerCallback": "beside the module, in every worker",
        "LambdaWorkerCallback": "one from functions",
        "PredictionWriter": "writes predictions as Parquet files",
        "TuneReportCallback": "reports to Ray Tune",
    },
    "Strategies": {
        "auto": "an argument in Lightning too, beside the registry",
        "local": "one worker, in the driver's process",
        "model_parallel": "Lightning's `ModelParallelStrategy`; settings: `rt.ModelParallel(tensor=..., data=...)`",
        "ddp_cpu": "`ddp` on CPUs, as in older releases",
        "dp": "one batch split over workers whose outputs are gathered, as in older releases; processes, not threads",
        "ddp2": "the same within each node",
    },
}  # fmt: skip

#: Arguments that are called otherwise here, by class or function.
RENAMED: dict[str, dict[str, str]] = {
    "LearningRateFinder": {"num_training_steps": "num_training"},
    "ThroughputMonitor": {"batch_size_fn": "samples", "length_fn": "tokens"},
    "AdvancedProfiler": {"line_count_restriction": "lines"},
}
