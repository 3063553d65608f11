"""`Trainer`: arguments become a plan, the plan a run, the run a result. There is no loop in here."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from raytrainer.callbacks import Callback, ModelCheckpoint, ModelSummary, ProgressBar, Tuner, WorkerCallback
from raytrainer.callbacks.arrange import arrange_callbacks
from raytrainer.callbacks.gradient_accumulation_scheduler import with_accumulation
from raytrainer.checkpoint import CheckpointPath, write_checkpoint
from raytrainer.config import check_names, instantiate
from raytrainer.data.dataset import as_ray_datasets
from raytrainer.datamodule import DataModule
from raytrainer.driver import pool
from raytrainer.driver.attributes import rate_attribute
from raytrainer.driver.checkpoints import CheckpointWriter, idle_checkpoint
from raytrainer.driver.cluster import Cluster, attached, own_reservation
from raytrainer.driver.datasets import has_dataset, lazy_predictions
from raytrainer.driver.groups import Groups
from raytrainer.driver.home import bring_home
from raytrainer.driver.logs import Logs, make_loggers
from raytrainer.driver.look import TrainerProperties
from raytrainer.driver.results import by_loader, outputs_by_loader, print_results, say_end
from raytrainer.driver.resuming import read_to_resume
from raytrainer.driver.run import Run
from raytrainer.driver.sources import require_data, require_methods, sources
from raytrainer.driver.state import RunState, TrainerState
from raytrainer.driver.tuning import LearningRates, find_learning_rate, scale_batch_size, short_settings
from raytrainer.errors import CheckpointError, ConfigurationError
from raytrainer.gpu.memory import open_nvml
from raytrainer.gpu.select import count_all
from raytrainer.loggers import CSVLogger, Logger
from raytrainer.messages import Task
from raytrainer.module import Module
from raytrainer.plan.settings import build_settings
from raytrainer.plan.strategies import DDP
from raytrainer.profilers import Profiler, make_profiler
from raytrainer.seeding import last_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Trainer"]

log = logging.getLogger("raytrainer")


class Trainer(TrainerProperties):
    """Trains a Module on the driver's process, or on Ray workers that form a torch.distributed group.

    All counts of batches are per worker; a *step* is one optimizer step; steps take precedence over epochs, and a
    maximum beats a minimum.

    Args:
        strategy: "auto" (one worker and no cluster in use: "local", otherwise "ddp"), "local" (the driver's process),
            "ddp" (one batch per worker), "ddp_cpu" (ddp on CPUs), "ddp_spawn" (the same as "ddp"), "ddp2" (one batch
            per node, split over its workers), "dp" (one batch for the job, split over the workers of one node); or a
            `DDP`, `DDP2` or `DP` object, which has settings.
        num_nodes: Nodes to train on. A pair (fewest, most) makes the run elastic: when workers are lost and not to be
            had again within `placement_timeout`, it goes on with fewer, and grows again at the next epoch when it can.
        num_processes: CPU workers on each node [1]; or a pair, as for `num_nodes`.
        gpus: GPUs on each node: a number, -1 for all, None or 0 for CPU; or which ones: [0, 2] or "0,2", in PCI bus
            order (as `nvidia-smi` counts), the same on every node; "2-4" is elastic. One GPU without a cluster is used
            by the driver's own process.
        auto_select_gpus: Of each node's GPUs, use those that NVML shows free (no process, next to no memory), least
            loaded first; `gpus` is then a number.
        log_gpu_memory: On logging steps, log the memory in use (MiB, by NVML) of every GPU of the job: "all": each, as
            "gpu_memory/node0-gpu1"; "min_max": "gpu_memory/min" and "gpu_memory/max"; None: do not.
        placement_timeout: Seconds to wait until the cluster has what is asked for.
        address: The Ray cluster to train on: "HOST:PORT" of one that this machine belongs to, "ray://HOST:PORT" of one
            that it does not, "auto": the one that `ray start` has made on this machine, "local": a new one. None: the
            Ray that is initialised, else RAY_ADDRESS, else as "auto", else one is started.
        runtime_env: What workers need beside what is installed where they run, as for `ray.init`; used when this
            trainer attaches to a cluster. None: a copy of the script's directory; {}: nothing.
        worker_output: Whose prints are shown: "rank_zero", while the other workers' go to files that errors name; or
            "all", each line with its rank.
        max_epochs: Epochs at most [1000 when neither max_steps nor max_time is given]; -1: no limit.
        min_epochs: Epochs before a requested stop is honoured.
        max_steps: The run ends exactly at this step, whatever `max_epochs` says; -1 or None: no limit.
        min_steps: A requested stop is honoured from this step on, whatever `min_epochs` says.
        max_time: Time to train at most: "DD:HH:MM:SS", a timedelta, or its arguments as a dict.
        check_val_every_n_epoch: Validate in every n-th epoch; None: count `val_check_interval` across epochs.
        val_check_interval: A float f validates every max(1, int(n * f)) of an epoch's n batches, an int k every k.
        num_sanity_val_steps: Validation batches per loader before training; 0: none, -1: all.
        limit_train_batches: An int is a number of batches, a float in [0, 1] a fraction; 0 switches training off.
        limit_val_batches: Likewise, for each validation loader.
        limit_test_batches: Likewise, for each test loader.
        limit_predict_batches: Likewise, for each prediction loader.
        overfit_batches: Train on the same, unshuffled batches in every epoch, and validate on as many.
        fast_dev_run: True or n: run one or n batches of everything, once, and write nothing.
        gradient_clip_val: Clip gradients to this norm or value; None or 0: do not.
        gradient_clip_algorithm: "norm" or "value".
        accumulate_grad_batches: Batches per step; an epoch's last batch always steps.
        precision: 32, 64, 16 or "16-mixed", "bf16" or "bf16-mixed", "16-true", "bf16-true".
        deterministic: True: only deterministic algorithms; "warn": where they exist.
        benchmark: Let cuDNN pick the fastest kernels, which pays off when input sizes stay the same.
        float32_matmul_precision: "highest", "high" or "medium": how exactly float32 matrices are multiplied on GPUs;
            "high" uses TF32. None: as torch is set.
        compile: True, or a dict of options of `torch.compile`: compile the module's `forward` and its direct children,
            in place, for the run. Names in state dicts stay as they are.
        sync_batchnorm: Normalise by the samples of all workers (`torch.nn.SyncBatchNorm`); on GPUs only.
        seed: Seeds generators, shuffling and loader processes in all workers [that of `seed_everything`, if called].
        detect_anomaly: Find the operation that produced a NaN in the backward pass; slow.
        inference_mode: Evaluate under `torch.inference_mode` rather than `torch.no_grad`.
        use_distributed_sampler: Shard loaders over workers, and draw their shuffling from (seed, epoch).
        reload_dataloaders_every_n_epochs: Build loaders anew every n epochs; 0: never.
        log_every_n_steps: Give step values to loggers every n steps.
        logger: A logger, a list of them, False for none, True for a `CSVLogger` in `default_root_dir`.
        profiler: "simple" (a table of hooks and their times), "advanced" (cProfile), "pytorch" (torch.profiler, a
            Chrome trace for each worker), or a `Profiler`. Reports go to `profile/` in the log directory.
        callbacks: `Callback`s, which run on the driver, and `WorkerCallback`s, which run beside the module.
        enable_progress_bar: Show progress.
        enable_model_summary: Print a summary of the module before training.
        max_failures: Lost workers to recover from in one `fit`: the group is rebuilt and goes on from the newest
            snapshot or checkpoint. Errors of user code are never retried. "local" recovers nothing.
        snapshot_every: In-memory snapshots for that: an int is steps; a "DD:HH:MM:SS" or timedelta is time; "auto": at
            most every 10 s, costing under 1 % of the time, but for the first one; None: none.
        hang_timeout: Seconds without an answer from training workers after which they count as lost.
        enable_checkpointing: Save the latest checkpoint at each epoch's end, if no `ModelCheckpoint` is given.
        default_root_dir: Where logs and checkpoints go [the working directory].
        idle_timeout: Seconds that unused workers are kept for the next run, unless others in the cluster wait for what
            they hold; 0: not at all.

    Raises:
        ConfigurationError: A value, or a pair of values, cannot work.
    """

    def __init__(
        self,
        *,
        strategy: str | DDP = "auto",
        num_nodes: int | tuple[int, int] = 1,
        num_processes: int | tuple[int, int] | None = None,
        gpus: int | str | Sequence[int] | None = None,
        auto_select_gpus: bool = False,
        log_gpu_memory: str | None = None,
        placement_timeout: float = 60.0,
        address: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        worker_output: str = "rank_zero",
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int | None = None,
        min_steps: int | None = None,
        max_time: str | timedelta | Mapping[str, int] | None = None,
        check_val_every_n_epoch: int | None = 1,
        val_check_interval: int | float | None = None,
        num_sanity_val_steps: int = 2,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        fast_dev_run: int | bool = False,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        accumulate_grad_batches: int = 1,
        precision: int | str = 32,
        deterministic: bool | str = False,
        benchmark: bool | None = None,
        float32_matmul_precision: str | None = None,
        compile: bool | Mapping[str, Any] = False,
        sync_batchnorm: bool = False,
        seed: int | None = None,
        detect_anomaly: bool = False,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        reload_dataloaders_every_n_epochs: int = 0,
        log_every_n_steps: int | None = 50,
        max_failures: int = 3,
        snapshot_every: int | str | timedelta | None = "auto",
        hang_timeout: float = 600.0,
        logger: Logger | Iterable[Logger] | bool | None = True,
        profiler: str | Profiler | None = None,
        callbacks: Callback | WorkerCallback | Iterable[Callback | WorkerCallback] | None = None,
        enable_progress_bar: bool = True,
        enable_model_summary: bool = True,
        enable_checkpointing: bool = True,
        default_root_dir: str | os.PathLike[str] | None = None,
        idle_timeout: float = 300.0,
    ) -> None:
        cluster = Cluster(address, runtime_env)
        # a Ray Tune trial has its share of the cluster already, and is like a machine of its own
        on_cluster = attached(cluster) and own_reservation() is None
        if gpus in (-1, "-1") and (strategy == "local" or not on_cluster):
            gpus = count_all(open_nvml())
        self._settings = build_settings(
            strategy=strategy, num_nodes=num_nodes, num_processes=num_processes, gpus=gpus,
            max_epochs=max_epochs, min_epochs=min_epochs, max_steps=max_steps, min_steps=min_steps, max_time=max_time,
            check_val_every_n_epoch=check_val_every_n_epoch, val_check_interval=val_check_interval,
            num_sanity_val_steps=num_sanity_val_steps, limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches, limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches, overfit_batches=overfit_batches, fast_dev_run=fast_dev_run,
            gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm,
            accumulate_grad_batches=accumulate_grad_batches, precision=precision, deterministic=deterministic,
            benchmark=benchmark, float32_matmul_precision=float32_matmul_precision, compile=compile,
            sync_batchnorm=sync_batchnorm, seed=last_seed() if seed is None else seed, detect_anomaly=detect_anomaly,
            inference_mode=inference_mode, use_distributed_sampler=use_distributed_sampler,
            reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs, log_every_n_steps=log_every_n_steps,
            max_failures=max_failures, snapshot_every=snapshot_every, hang_timeout=hang_timeout,
            cluster_attached=on_cluster, auto_select_gpus=auto_select_gpus, log_gpu_memory=log_gpu_memory,
            worker_output=worker_output,
        )  # fmt: skip
        self.default_root_dir = os.path.abspath(os.path.expanduser(default_root_dir or os.getcwd()))
        self._every_gpu = self._settings.gpus == -1
        self._groups = Groups(cluster, placement_timeout, idle_timeout)
        self._profiler = make_profiler(profiler)
        self._loggers = [] if self.fast_dev_run else make_loggers(logger, self.default_root_dir)
        self._logs = Logs(self._loggers)
        # module code may call self.logger in a dry run too, to no effect
        self._worker_logs = True if self._loggers else False if self.fast_dev_run and logger else None
        extras: list[Callback] = []
        if enable_progress_bar:
            extras.append(ProgressBar())
        if enable_model_summary:
            extras.append(ModelSummary())
        if enable_checkpointing and not self.fast_dev_run:
            extras.append(ModelCheckpoint())
        self._own_callbacks = arrange_callbacks(callbacks, extras)
        self._callbacks = self._own_callbacks
        self._state = RunState()
        self._writer = CheckpointWriter()
        self._module: Module | None = None
        self._datamodule: DataModule | None = None
        self._run: Run | None = None  # the latest
        self._probing = False  # whether this is a copy of a Trainer, for a short run that finds something out

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A Trainer from plain values, such as a YAML or JSON file has.
        Args:
            config: Arguments by name. Callbacks, loggers and the like are `{"class_path": "package.Class", "init_args":
                {...}}`; a path without a dot names something of raytrainer's.
        Raises:
            ConfigurationError: There is no such argument or class, or a value cannot work.
        """
        arguments = instantiate(config)
        check_names(cls, arguments)
        return cls(**arguments)

    # ---------------------------------------------------------------- the four verbs

    def fit(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: CheckpointPath | None = None,
    ) -> None:
        """Train. Afterwards `model` holds the trained weights, buffers and hyperparameters.

        Args:
            model: The module.
            train_dataloaders: A training loader, a `RayDataset` (or `ray.data.Dataset`), or a DataModule.
            val_dataloaders: One validation loader or `RayDataset`, or a list of them.
            datamodule: Where loaders come from that are not given here.
            ckpt_path: A checkpoint to go on from: its path or URI; "last": the newest that this trainer's
                `ModelCheckpoint` finds, in an earlier process too (none: begin at the beginning); "best"; or what
                `ray.tune.get_checkpoint()` gives, when `TuneReportCallback` has reported it.

        Raises:
            Exception: Whatever user code raised; from a worker, with a `WorkerError` as its cause.
            ConfigurationError: Module, data and settings do not fit together.
            WorkerLostError: A worker is gone.
        """
        module, datamodule, loaders = sources(model, datamodule, train=train_dataloaders, val=val_dataloaders)
        require_methods("fit", module, "training_step", "configure_optimizers")
        require_data("fit", "train", loaders, module, datamodule)
        run = self._begin("fit", module, datamodule, loaders)
        checkpoint = self._read(ckpt_path)
        if checkpoint is None and not self.fast_dev_run:
            for callback in self._callbacks:
                if isinstance(callback, Tuner):
                    callback.tune(self, module, loaders.get("train"), datamodule)
        with run.started() as coordinator:
            if checkpoint is not None:
                run.resume(checkpoint, coordinator)
            report = coordinator.fit(checkpoint)
            bring_home(module, datamodule, report, coordinator.group)
            self._emit("on_fit_end")
        if not self._probing:
            say_end(self._state)

    def validate(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: CheckpointPath | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
    ) -> list[dict[str, float]]:
        """Run one validation epoch.

        Args:
            model: The module; default: the one of the last run.
            dataloaders: One loader, a list of them, or a DataModule.
            ckpt_path: A checkpoint whose weights to use; default: the module's own.
            verbose: Print the metrics.
            datamodule: Where loaders come from that are not given here.

        Returns:
            A list with one dict of metrics for each loader.
        """
        return self._evaluate("validate", model, dataloaders, ckpt_path, verbose, datamodule)[0]

    def test(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: CheckpointPath | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
    ) -> list[dict[str, float]]:
        """Run one test epoch; arguments and result as for `validate`."""
        return self._evaluate("test", model, dataloaders, ckpt_path, verbose, datamodule)[0]

    def predict(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        return_predictions: bool = True,
        ckpt_path: CheckpointPath | None = None,
    ) -> Any:
        """Predict every batch, on all workers.

        Returns:
            What `predict_step` returned for each batch, in the loader's order; with several loaders a list of such
            lists; None without `return_predictions`. For a `RayDataset` (or `ray.data.Dataset`) instead a
            `ray.data.Dataset` that is computed when it is read or written: each row's columns, and the columns that
            `predict_step` returned for it as a dict ("prediction" where it returned a tensor).
        """
        lazy = self._predict_lazily(model or self._module, dataloaders, datamodule, ckpt_path)
        if lazy is not None:
            return lazy
        outputs, loaders = self._evaluate(
            "predict", model, dataloaders, ckpt_path, False, datamodule, return_predictions
        )[1:]
        return outputs_by_loader(outputs, loaders) if return_predictions else None

    def _predict_lazily(self, model: Any, data: Any, datamodule: DataModule | None, ckpt_path: Any) -> Any:
        """Predictions for Ray Datasets; None if it is something else that shall be predicted."""
        if model is not None and datamodule is None and data is None and model is self._module:
            datamodule = self._datamodule
        given = isinstance(data, DataModule) or data is None
        if model is None or (not given and as_ray_datasets(data) is None):
            return None
        module, datamodule, loaders = sources(model, datamodule, predict=data)
        if not loaders and not has_dataset("predict", datamodule, module):
            return None
        run = self._begin("predict", module, datamodule, loaders)
        return lazy_predictions(run.task, self._settings, self._groups.cluster, self._read(ckpt_path))

    def _evaluate(
        self,
        stage: str,
        model: Module | None,
        dataloaders: Any,
        ckpt_path: CheckpointPath | None,
        verbose: bool,
        datamodule: DataModule | None,
        ask_predictions: bool = False,
    ) -> tuple[list[dict[str, float]], list[Any], int]:
        model = model if model is not None else self._module
        if model is None:
            raise ConfigurationError(f"{stage}() needs a model: this trainer has not run one yet.")
        if datamodule is None and dataloaders is None and model is self._module:
            datamodule = self._datamodule
        name = {"validate": "val"}.get(stage, stage)
        module, datamodule, loaders = sources(model, datamodule, **{name: dataloaders})
        if stage != "predict":
            require_methods(stage, module, {"validate": "validation_step", "test": "test_step"}[stage])
        require_data(stage, name, loaders, module, datamodule)
        if self._settings.limit(name) == 0:
            log.info("limit_%s_batches=0: nothing to %s.", name, stage)
            return [], [], 1
        checkpoint = self._read(ckpt_path)
        run = self._begin(stage, module, datamodule, loaders)
        run.task.ask_predictions = ask_predictions
        with run.started() as coordinator:
            values, predictions = coordinator.evaluate(stage, checkpoint)
        results = by_loader(values, len(self._state.num_batches[stage]))
        if verbose:
            print_results(stage, results)
        return results, predictions, len(self._state.num_batches[stage])

    # ---------------------------------------------------------------- tuning

    def lr_find(
        self,
        model: Module,
        train_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        min_lr: float = 1e-8,
        max_lr: float = 1.0,
        num_training: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = False,
        attr_name: str | None = None,
    ) -> LearningRates:
        """Train a copy of the module for a few steps, with a learning rate that rises, and look at the loss.

        The module, its weights and this process's generators are as before. All parameter groups have the same rate;
        schedulers, callbacks and loggers are left out. The workers are those of this Trainer.

        Args:
            model: The module.
            train_dataloaders: A training loader, or a DataModule.
            datamodule: Where the loader comes from if it is not given.
            min_lr: The first learning rate.
            max_lr: The last one.
            num_training: Steps.
            mode: "exponential" or "linear".
            early_stop_threshold: Stop where the smoothed loss is so many times its best; None: do not.
            update_attr: Set `attr_name` of the module to the suggestion, if there is one.
            attr_name: An attribute or hyperparameter; None: `lr` or `learning_rate`.

        Returns:
            The rates and losses, with `suggestion()` and `plot()`.

        Raises:
            ConfigurationError: An argument cannot work, or the module has no such attribute.
        """
        module, datamodule, loaders = sources(model, datamodule, train=train_dataloaders)
        attribute = (attr_name or rate_attribute(module)) if update_attr else None
        return find_learning_rate(
            self._probe, module, loaders.get("train"), datamodule,
            min_lr=min_lr, max_lr=max_lr, num_training=num_training, mode=mode,
            early_stop_threshold=early_stop_threshold, attribute=attribute,
        )  # fmt: skip

    def scale_batch_size(
        self,
        model: Module,
        train_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
    ) -> int:
        """Find the largest batch size that fits into memory, and set it.

        Copies of the module train for a few steps each; the module's weights and this process's generators are as
        before. The search also ends where one batch holds all the data.

        Args:
            model: The module.
            train_dataloaders: A DataModule; loaders that are made already have a batch size that stays.
            datamodule: Likewise.
            mode: "power": double the size until it no longer fits; "binsearch": then halve the gap until it is known.
            steps_per_trial: Steps to try each size for.
            init_val: The first size.
            max_trials: Sizes to try at most.
            batch_arg_name: Attribute or hyperparameter of the DataModule or Module, which `train_dataloader` reads.

        Returns:
            The size.

        Raises:
            ConfigurationError: An argument cannot work, or nothing has such an attribute.
            ResourceError: No size fits.
        """
        module, datamodule, loaders = sources(model, datamodule, train=train_dataloaders)
        if loaders:
            raise ConfigurationError(
                "scale_batch_size was given a loader, whose batch size stays as it is: write train_dataloader() in "
                "the DataModule or Module, and have it read self.batch_size."
            )
        return scale_batch_size(
            self._probe, module, datamodule,
            mode=mode, steps_per_trial=steps_per_trial, init_val=init_val, max_trials=max_trials,
            attribute=batch_arg_name,
        )  # fmt: skip

    def _probe(self, callbacks: list[Callback | WorkerCallback], loggers: list[Logger], **settings: Any) -> Trainer:
        """A copy of this Trainer for a short run of its own that writes nothing, with other `settings`."""
        probe = copy.copy(self)
        probe._probing, probe._profiler = True, None
        probe._own_callbacks = probe._callbacks = callbacks
        probe._loggers, probe._logs, probe._worker_logs = loggers, Logs(loggers), False
        probe._state, probe._writer, probe._run = RunState(), CheckpointWriter(), None
        probe._settings = short_settings(self._settings, **settings)
        return probe

    # ---------------------------------------------------------------- a run

    def _begin(self, stage: str, module: Module, datamodule: DataModule | None, loaders: dict[str, Any]) -> Run:
        """A run with a fresh state, not started yet."""
        if self._every_gpu:
            self._settings = self._groups.with_every_gpu(self._settings)
        self._module, self._datamodule = module, datamodule
        previous = self._state.progress
        self._state = RunState(TrainerState(fn=stage))
        self._logs = Logs(self._loggers)
        if stage != "fit":  # counters of the last fit stay visible
            self._state.progress = previous
        given = None if self._probing else module.configure_callbacks()
        self._callbacks = arrange_callbacks(given, self._own_callbacks)
        self._settings = with_accumulation(self._settings, self._callbacks)
        task = self._task(stage, module, datamodule, loaders)
        self._run = run = Run(
            task, self._state, self._callbacks, self._emit, self._logs, self._groups, self._writer, self._probing
        )
        return run

    def _task(self, stage: str, module: Module, datamodule: DataModule | None, loaders: dict[str, Any]) -> Task:
        seed = self._settings.seed
        return Task(
            stage=stage,
            module=module,
            datamodule=datamodule,
            settings=self._settings,
            callbacks=[c for c in self._callbacks if isinstance(c, WorkerCallback)],
            loaders=loaders,
            # torch's own generator, so that a user's torch.manual_seed makes a run repeatable
            seed=int(torch.randint(2**62, ())) if seed is None else seed,
            reseed=seed is not None or self._settings.strategy != "local",
            default_root_dir=self.default_root_dir,
            logs=self._worker_logs,
            profiler=self._profiler,
        )

    def _read(self, ckpt_path: CheckpointPath | None) -> dict[str, Any] | None:
        return read_to_resume(ckpt_path, self._callbacks, self._loggers, self.default_root_dir)

    def _emit(self, hook: str, *args: Any) -> None:
        """Call a hook of the driver's callbacks; those that save run last."""
        for callback in self._callbacks:
            if isinstance(callback, Callback):
                getattr(callback, hook)(self, self._module, *args)

    # ---------------------------------------------------------------- logging

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Give values to the loggers from a callback, at the current step unless another is given."""
        self._logs.rows([(self.global_step if step is None else step, {**metrics, "epoch": self.current_epoch})])

    def plot(self, names: str | Sequence[str] | None = None) -> Figure:
        """Logged metrics over steps, as a matplotlib figure: `CSVLogger.plot` of this trainer's first `CSVLogger`.

        Args:
            names: Metrics to plot, by full name, or without their stage ("loss" for "train_loss" and "val_loss").
                None: all.

        Raises:
            ConfigurationError: There is no `CSVLogger`, matplotlib is not installed, nothing was logged, or a name is
                unknown.
        """
        logger = next((found for found in self._loggers if isinstance(found, CSVLogger)), None)
        if logger is None:
            raise ConfigurationError(
                "plot: this trainer keeps no metrics to plot; give it a CSVLogger, as logger=True (the default) does."
            )
        return logger.plot(names)

    # ---------------------------------------------------------------- checkpoints

    def save_checkpoint(self, filepath: str | os.PathLike[str], weights_only: bool = False, wait: bool = False) -> None:
        """Save a checkpoint: a directory, replaced in one move if it exists.

        Args:
            filepath: A path, or a URI that pyarrow knows ("s3://bucket/name.ckpt").
            weights_only: Leave out what only resuming needs.
            wait: Return when it is written; otherwise writing goes on in the background while there is a run.

        Raises:
            CheckpointError: There is nothing to save, or something in it is no plain value.
        """
        if self._module is None:
            raise CheckpointError("save_checkpoint: this trainer has no module yet; run fit first.")
        path = os.fspath(filepath)
        if self._run is None or not self._run.save(path, weights_only, wait):
            state = idle_checkpoint(self._module, self._state.progress)
            self._emit("on_save_checkpoint", state)
            write_checkpoint(path, state)

    def remove_checkpoint(self, filepath: str) -> None:
        """Delete a checkpoint, but never the one that this run went on from."""
        if filepath != self.ckpt_path:
            self._writer.remove(filepath)

    def checkpoint_exists(self, filepath: str) -> bool:
        """Whether a whole checkpoint is there."""
        return self._writer.exists(filepath)

    # ---------------------------------------------------------------- end

    def close(self) -> None:
        """Release the workers now, rather than after the idle time."""
        pool.close_idle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
