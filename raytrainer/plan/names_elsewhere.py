"""Names that other packages have, of what they export and of strategies, and what stands for each here."""

from __future__ import annotations

from collections.abc import Iterable

from raytrainer.plan.nearest_names import did_you_mean

__all__ = ["EXPORTED", "OF_A_TRAINER", "STRATEGIES_ELSEWHERE", "absent_of_a_trainer", "of_ray_train", "unknown_export"]

#: What other packages export, and what it is here.
EXPORTED = {
    "LightningModule": "raytrainer.Module",
    "LightningDataModule": "raytrainer.DataModule",
    **dict.fromkeys(("TQDMProgressBar", "RichProgressBar"), "raytrainer.ProgressBar"),
    "Tuner": "trainer.lr_find(model) and trainer.scale_batch_size(model)",
    **dict.fromkeys(("DDPStrategy", "TorchTrainer"), 'raytrainer.Trainer(strategy="ddp", gpus=...)'),
    **dict.fromkeys(("FSDPStrategy", "DeepSpeedStrategy"), "raytrainer.FSDP"),
    "SingleDeviceStrategy": 'raytrainer.Trainer(strategy="local")',
    "ModelParallelStrategy": "raytrainer.ModelParallel",
    **dict.fromkeys(("LightningEnvironment", "SLURMEnvironment"), "nothing: workers are Ray actors"),
    "LightningCLI": "python -m raytrainer fit --config run.yaml",
    "Fabric": "raytrainer.Trainer, and manual optimization: self.automatic_optimization = False in a Module",
    **dict.fromkeys(
        ("rank_zero_only", "rank_zero_info", "rank_zero_warn"),
        "nothing on the driver, where Callbacks and loggers run once; beside the module: if raytrainer.rank() == 0",
    ),
    "isolate_rng": "torch.random.fork_rng()",
    **dict.fromkeys(("NeptuneLogger", "CometLogger", "LitLogger"), "a class derived from raytrainer.Logger"),
    "ModelPruning": "torch.nn.utils.prune in on_train_epoch_end of a raytrainer.WorkerCallback",
    **dict.fromkeys(("pytorch", "utilities", "plugins"), "nothing: all names are in raytrainer itself"),
    # Ray Train's
    "ScalingConfig": "raytrainer.Trainer(num_processes=...) or (gpus=...), per node, and num_nodes=",
    "RunConfig": "raytrainer.Trainer(default_root_dir=..., callbacks=..., max_failures=...)",
    "FailureConfig": "raytrainer.Trainer(max_failures=...)",
    "CheckpointConfig": "raytrainer.ModelCheckpoint(save_top_k=..., monitor=..., mode=...)",
    "TorchConfig": "raytrainer.DDP(process_group_timeout=...)",
    "DataConfig": "raytrainer.RayDataset",
    "Checkpoint": "a path: fit(ckpt_path=...), Module.load_from_checkpoint",
    "Result": "trainer.callback_metrics, trainer.checkpoint_callback.best_model_path, and the trained module",
    "report": "self.log(...) in a Module, and raytrainer.ModelCheckpoint",
    "get_checkpoint": "fit(ckpt_path=...), which restores everything",
    "get_dataset_shard": "fit(module, raytrainer.RayDataset(...)), whose batches the steps are given",
    **dict.fromkeys(("get_context", "session"), "raytrainer.rank(), raytrainer.world_size(), self.trainer in a Module"),
    **dict.fromkeys(("prepare_model", "prepare_data_loader"), "nothing: the Trainer does it"),
    "get_device": "self.device in a Module",
}

#: What Trainers of others have, and what is called here in its place.
OF_A_TRAINER = {
    **dict.fromkeys(("train", "run", "start"), "trainer.fit(model, train_loader, val_loader)"),
    **dict.fromkeys(("evaluate", "eval"), "trainer.validate(model, loader) or trainer.test(model, loader)"),
    "tune": "trainer.lr_find(model) and trainer.scale_batch_size(model)",
    **dict.fromkeys(("save", "save_model"), "trainer.save_checkpoint(path)"),
    **dict.fromkeys(
        ("load", "restore", "load_checkpoint"), "trainer.fit(model, ckpt_path=...) or Module.load_from_checkpoint"
    ),
    "get_model": "the module that you gave to fit, or trainer.lightning_module",
    **dict.fromkeys(("fit_loop", "validate_loop", "test_loop", "predict_loop"), "nothing: loops cannot be replaced"),
    **dict.fromkeys(("metrics", "results"), "trainer.callback_metrics"),
    "epoch": "trainer.current_epoch",
    "step": "trainer.global_step",
}

#: Names of strategies of Lightning's, of 1.x too, and what to write.
STRATEGIES_ELSEWHERE = {
    "ddp_find_unused_parameters_true": "strategy=raytrainer.DDP(find_unused_parameters=True)",
    "ddp_find_unused_parameters_false": 'strategy="ddp"',
    **dict.fromkeys(("ddp_notebook", "ddp_fork", "ddp_notebook_find_unused_parameters_false"), 'strategy="ddp"'),
    "ddp_notebook_find_unused_parameters_true": "strategy=raytrainer.DDP(find_unused_parameters=True)",
    "single_device": 'strategy="local"',
    "fsdp_cpu_offload": "strategy=raytrainer.FSDP(cpu_offload=True)",
    **dict.fromkeys(
        ("ddp_sharded", "ddp_sharded_spawn", "ddp_fully_sharded", "fsdp_native", "colossalai"),
        'strategy="fsdp"',
    ),
    **dict.fromkeys(("horovod", "bagua", "ray_ddp", "ray"), 'strategy="ddp"'),
    "fsdp_native_full_shard_offload": "strategy=raytrainer.FSDP(cpu_offload=True)",
    **dict.fromkeys(("deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"), 'strategy="fsdp"'),
    **dict.fromkeys(
        ("deepspeed_stage_2_offload", "deepspeed_stage_3_offload"), "strategy=raytrainer.FSDP(cpu_offload=True)"
    ),
}


def absent_of_a_trainer(name: str, known: Iterable[str]) -> str:
    """What is said of an attribute that a Trainer has not."""
    if name in OF_A_TRAINER:
        return f"a Trainer has no {name!r}. Here: {OF_A_TRAINER[name]}."
    meant = did_you_mean(name, [one for one in known if not one.startswith("_")])
    return f"a Trainer has no {name!r}{meant and f'; {meant}'}"


def of_ray_train(value: object) -> str:
    """What stands for an object of Ray Train's, but for checkpoints, which are taken; "" of anything else."""
    kind = type(value)
    if kind.__module__.partition(".")[0] != "ray" or kind.__name__ not in EXPORTED or kind.__name__ == "Checkpoint":
        return ""
    return f" {kind.__name__} is Ray Train's; here that is {EXPORTED[kind.__name__]}."


def unknown_export(name: str, known: Iterable[str]) -> str:
    """What is said of a name that the package does not export: what stands for it, or the nearest; or ""."""
    if name in EXPORTED:
        return f"; here that is {EXPORTED[name]}"
    meant = did_you_mean(name, known, cutoff=0.75)
    return f"; {meant}" if meant else ""
