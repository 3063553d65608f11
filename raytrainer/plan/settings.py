"""The frozen plan of a run: every setting, validated once, in its one normal form."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raytrainer.errors import ConfigurationError
from raytrainer.plan import checks
from raytrainer.plan.strategies import DDP, parse_strategy

__all__ = ["STAGES", "Settings", "build_settings"]

log = logging.getLogger("raytrainer")

STAGES = ("fit", "validate", "test", "predict")


@dataclass(frozen=True)
class Settings:
    """What a `Trainer` was asked for. `Trainer` documents each name; this holds them validated.

    Lengths of time are in seconds; all counts of batches are per worker; None means no such limit.
    """

    # how long
    min_epochs: int = 1
    max_epochs: int | None = 1000
    min_steps: int | None = None
    max_steps: int | None = None
    max_seconds: float | None = None
    # when to validate
    check_val_every_n_epoch: int | None = 1
    val_check_interval: int | float = 1.0
    num_sanity_val_steps: int = 2
    # how much of the data
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    limit_test_batches: int | float = 1.0
    limit_predict_batches: int | float = 1.0
    overfit: bool = False
    fast_dev_run: int = 0
    use_distributed_sampler: bool = True
    reload_dataloaders_every_n_epochs: int = 0
    # optimisation
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str = "norm"
    accumulate_grad_batches: int = 1
    accumulation: tuple[tuple[int, int], ...] = ()  # (first epoch, batches per step), in place of the one number
    precision: str = "32-true"
    deterministic: bool | str = False
    benchmark: bool | None = None
    float32_matmul_precision: str | None = None
    compile: dict[str, Any] | None = None  # options of torch.compile
    sync_batchnorm: bool = False
    detect_anomaly: bool = False
    inference_mode: bool = True
    seed: int | None = None
    # where
    strategy: str = "local"
    ddp: DDP = field(default_factory=DDP)
    num_nodes: int = 1
    num_processes: int = 1
    gpus: int | tuple[int, ...] = 0  # -1: all of each node, a number that is known when a run begins
    auto_select_gpus: bool = False
    log_gpu_memory: str | None = None  # "all" or "min_max"
    fewest_nodes: int = 1  # an elastic run goes on with as few nodes and workers per node as these
    fewest_per_node: int = 1
    log_every_n_steps: int = 50
    # failures
    max_failures: int = 3
    snapshot_every: int | float | str | None = "auto"
    hang_timeout: float = 600.0
    worker_output: str = "rank_zero"

    @property
    def on_gpu(self) -> bool:
        return self.gpus != 0

    @property
    def workers_per_node(self) -> int:
        if isinstance(self.gpus, tuple):
            return len(self.gpus)
        return self.gpus if self.gpus > 0 else self.num_processes

    @property
    def world_size(self) -> int:
        return 1 if self.strategy == "local" else self.num_nodes * self.workers_per_node

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(nodes, workers per node) that the run may have, largest first; one, unless it is elastic."""
        sizes = [
            (nodes, workers)
            for nodes in range(self.fewest_nodes, self.num_nodes + 1)
            for workers in range(min(self.fewest_per_node, self.workers_per_node), self.workers_per_node + 1)
        ]
        return sorted(sizes, key=lambda size: (size[0] * size[1], size[0]), reverse=True)

    @property
    def accumulates(self) -> bool:
        """Whether there may be several batches to a step."""
        return max([self.accumulate_grad_batches, *(batches for _, batches in self.accumulation)]) > 1

    def accumulated(self, epoch: int) -> int:
        """Batches per step in an epoch."""
        begun = [batches for first, batches in self.accumulation if first <= epoch]
        return begun[-1] if begun else self.accumulate_grad_batches

    def limit(self, stage: str) -> int | float:
        """The limit on batches of "train", "val", "test" or "predict"."""
        limit: int | float = getattr(self, f"limit_{stage}_batches")
        return limit


def build_settings(
    *,
    min_epochs: int | None = None,
    max_epochs: int | None = None,
    min_steps: int | None = None,
    max_steps: int | None = None,
    max_time: Any = None,
    check_val_every_n_epoch: int | None = 1,
    val_check_interval: int | float | None = None,
    num_sanity_val_steps: int = 2,
    limit_train_batches: int | float | None = None,
    limit_val_batches: int | float | None = None,
    limit_test_batches: int | float | None = None,
    limit_predict_batches: int | float | None = None,
    overfit_batches: int | float = 0.0,
    fast_dev_run: int | bool = False,
    use_distributed_sampler: bool = True,
    reload_dataloaders_every_n_epochs: int = 0,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
    accumulate_grad_batches: int = 1,
    precision: int | str = 32,
    deterministic: bool | str = False,
    benchmark: bool | None = None,
    float32_matmul_precision: str | None = None,
    compile: bool | Mapping[str, Any] = False,
    sync_batchnorm: bool = False,
    detect_anomaly: bool = False,
    inference_mode: bool = True,
    seed: int | None = None,
    strategy: str | DDP = "auto",
    num_nodes: int | tuple[int, int] = 1,
    num_processes: int | tuple[int, int] | None = None,
    gpus: Any = None,
    auto_select_gpus: bool = False,
    log_gpu_memory: str | None = None,
    log_every_n_steps: int | None = 50,
    max_failures: int = 3,
    snapshot_every: Any = "auto",
    hang_timeout: float = 600.0,
    worker_output: str = "rank_zero",
    cluster_attached: bool = False,
) -> Settings:
    """Validate a Trainer's arguments (documented there) and bring each into its one normal form.

    `cluster_attached` tells whether the driver already uses a Ray cluster, which `strategy="auto"` takes up.

    Raises:
        ConfigurationError: A value, or a pair of values, cannot work.
    """
    settings = Settings(
        min_epochs=_epochs("min_epochs", min_epochs, 1),
        max_epochs=_max_epochs(max_epochs, max_steps, max_time),
        min_steps=checks.count("min_steps", min_steps, least=0, none=True),
        max_steps=_unlimited(checks.count("max_steps", max_steps, least=0, none=True, minus_one="no limit")),
        max_seconds=checks.duration("max_time", max_time),
        check_val_every_n_epoch=checks.count("check_val_every_n_epoch", check_val_every_n_epoch, least=1, none=True),
        val_check_interval=_val_check_interval(val_check_interval, check_val_every_n_epoch),
        num_sanity_val_steps=checks.count(
            "num_sanity_val_steps", num_sanity_val_steps, least=0, minus_one="the whole validation set"
        ),
        **_limits(
            overfit_batches,
            train=limit_train_batches,
            val=limit_val_batches,
            test=limit_test_batches,
            predict=limit_predict_batches,
        ),
        use_distributed_sampler=bool(checks.boolean("use_distributed_sampler", use_distributed_sampler)),
        reload_dataloaders_every_n_epochs=checks.count(
            "reload_dataloaders_every_n_epochs", reload_dataloaders_every_n_epochs, least=0
        ),
        **_clipping(gradient_clip_val, gradient_clip_algorithm),
        accumulate_grad_batches=checks.count("accumulate_grad_batches", accumulate_grad_batches, least=1),
        precision=checks.precision(precision),
        deterministic=checks.choice("deterministic", deterministic, (False, True, "warn")),
        benchmark=checks.boolean("benchmark", benchmark, none=True),
        float32_matmul_precision=checks.choice(
            "float32_matmul_precision", float32_matmul_precision, (None, "highest", "high", "medium")
        ),
        compile=checks.compile_options(compile),
        sync_batchnorm=bool(checks.boolean("sync_batchnorm", sync_batchnorm)),
        detect_anomaly=bool(checks.boolean("detect_anomaly", detect_anomaly)),
        inference_mode=bool(checks.boolean("inference_mode", inference_mode)),
        seed=_seed(seed),
        **_placement(strategy, num_nodes, num_processes, gpus, cluster_attached),
        auto_select_gpus=_auto_select(auto_select_gpus, gpus),
        log_gpu_memory=checks.choice("log_gpu_memory", log_gpu_memory, (None, "all", "min_max")),
        log_every_n_steps=_every(log_every_n_steps),
        max_failures=checks.count("max_failures", max_failures, least=0),
        snapshot_every=_snapshot_every(snapshot_every),
        worker_output=checks.choice("worker_output", worker_output, ("rank_zero", "all")),
        hang_timeout=checks.number("hang_timeout", hang_timeout, above=0.0, none=False) or 0.0,
    )
    if settings.deterministic is True and benchmark:
        raise ConfigurationError(
            "deterministic=True with benchmark=True: benchmarking picks kernels by their speed, which differs from "
            "run to run; drop one of the two."
        )
    if settings.sync_batchnorm and not settings.on_gpu and settings.world_size > 1:
        raise ConfigurationError(
            f"sync_batchnorm=True with {settings.world_size} CPU workers: torch.nn.SyncBatchNorm works on GPUs only; "
            f"use gpus=..., or sync_batchnorm=False (each worker then normalises by its own samples)."
        )
    if settings.ddp.gradient_compression == "bf16" and not settings.on_gpu and settings.world_size > 1:
        raise ConfigurationError(
            'gradient_compression="bf16" on CPUs: torch has it for NCCL only; use gpus=..., "fp16", or None.'
        )
    if max_steps not in (None, -1) and max_epochs is not None:
        log.warning(
            "max_steps=%s and max_epochs=%s are both given: steps take precedence, so the run ends at %s steps.",
            max_steps, max_epochs, max_steps,
        )  # fmt: skip
    return _for_fast_dev_run(settings, fast_dev_run)


def _unlimited(value: Any) -> Any:
    return None if value == -1 else value


def _epochs(name: str, value: int | None, default: int) -> int:
    return default if value is None else int(checks.count(name, value, least=0))


def _max_epochs(value: int | None, max_steps: int | None, max_time: Any) -> int | None:
    if value is None:
        return 1000 if max_steps in (None, -1) and max_time is None else None
    epochs: int | None = _unlimited(checks.count("max_epochs", value, least=0, minus_one="no limit"))
    return epochs


def _val_check_interval(value: int | float | None, every_n_epoch: int | None) -> int | float:
    if value is None:
        value = 1.0
    checked = checks.fraction_or_count("val_check_interval", value, least=1)
    if every_n_epoch is None and isinstance(checked, float):
        raise ConfigurationError(
            f"val_check_interval={value!r} with check_val_every_n_epoch=None: batches are counted across epochs, so "
            f"give a number of batches as an int."
        )
    return checked


def _limits(overfit: int | float, **limits: int | float | None) -> dict[str, Any]:
    overfit = checks.fraction_or_count("overfit_batches", overfit)
    checked = {}
    for stage, value in limits.items():
        name = f"limit_{stage}_batches"
        if overfit and stage in ("train", "val"):
            if value is not None:
                raise ConfigurationError(
                    f"overfit_batches={overfit!r} with {name}={value!r}: overfit_batches already limits training and "
                    f"validation; give one of the two."
                )
            value = overfit
        checked[name] = checks.fraction_or_count(name, 1.0 if value is None else value)
    return {**checked, "overfit": bool(overfit)}


def _clipping(value: float | None, algorithm: str | None) -> dict[str, Any]:
    value = checks.number("gradient_clip_val", value, above=0.0) if value != 0 else None
    if algorithm is None:
        return {"gradient_clip_val": value}
    checks.choice("gradient_clip_algorithm", algorithm, ("norm", "value"))
    return {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm}


def _seed(value: int | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ConfigurationError(f"seed={value!r}: give an integer from 0 to 2**63 - 1, or None.")
    return value


def _every(value: int | None) -> int:
    return 0 if value is None else checks.count("log_every_n_steps", value, least=0)


def _snapshot_every(value: Any) -> int | float | str | None:
    """Steps as an int, seconds as a float, "auto", or None for never."""
    if value in (None, 0) or value == "auto":
        return value or None
    if isinstance(value, int):
        steps: int = checks.count("snapshot_every", value, least=1)
        return steps
    return checks.duration("snapshot_every", value)


def _placement(
    strategy: str | DDP,
    num_nodes: int | tuple[int, int],
    num_processes: int | tuple[int, int] | None,
    gpus: Any,
    cluster_attached: bool,
) -> dict[str, Any]:
    strategy, ddp = parse_strategy(strategy)
    fewest_nodes, nodes = checks.span("num_nodes", num_nodes)
    fewest_processes, processes = (None, None) if num_processes is None else checks.span("num_processes", num_processes)
    fewest_gpus, chosen = checks.gpu_span(gpus)
    if chosen and processes is not None:
        raise ConfigurationError(
            f"gpus={gpus!r} with num_processes={processes}: with GPUs there is one worker per GPU; drop num_processes."
        )
    if strategy == "ddp_cpu" and chosen:
        raise ConfigurationError(f'strategy="ddp_cpu" with gpus={gpus!r}: it trains on CPUs; use "ddp" for GPUs.')
    if strategy == "ddp_spawn":
        log.info('strategy="ddp_spawn" is "ddp" here: workers are Ray actors, which have none of spawn\'s limits.')
    processes = processes or 1
    count = len(chosen) if isinstance(chosen, tuple) else max(chosen, 0) or processes
    several = nodes * count != 1
    if strategy == "local" and several:
        raise ConfigurationError(
            f'strategy="local" with {nodes} node(s) and {count} worker(s) each: "local" is the driver\'s own process; '
            f'use "ddp" for several workers.'
        )
    if strategy == "dp" and nodes > 1:
        raise ConfigurationError(
            f'strategy="dp" with num_nodes={num_nodes!r}: it splits each batch over the workers of one node; use '
            f'"ddp2" for one batch per node.'
        )
    if strategy == "auto":
        strategy = "ddp" if several or cluster_attached or chosen == -1 else "local"
    return {
        "strategy": "ddp" if strategy in ("ddp_cpu", "ddp_spawn") else strategy,
        "ddp": ddp,
        "num_nodes": nodes,
        "num_processes": processes,
        "gpus": chosen,
        "fewest_nodes": fewest_nodes,
        "fewest_per_node": fewest_gpus or fewest_processes or count,
    }


def _auto_select(value: bool, gpus: Any) -> bool:
    chosen = checks.gpu_span(gpus)[1]
    if checks.boolean("auto_select_gpus", value) and (isinstance(chosen, tuple) or chosen < 1):
        raise ConfigurationError(
            f"auto_select_gpus=True with gpus={gpus!r}: it picks GPUs that are free, so give their number; with chosen "
            f"ones, all or none there is nothing to pick."
        )
    return value


def _for_fast_dev_run(settings: Settings, fast_dev_run: int | bool) -> Settings:
    """n batches of every loader, one epoch, nothing written: a quick walk through every line of user code."""
    batches = checks.count("fast_dev_run", int(fast_dev_run), least=0)
    if not batches:
        return settings
    return replace(
        settings,
        fast_dev_run=batches,
        max_epochs=1,
        max_steps=None,
        max_seconds=None,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=1,
        val_check_interval=1.0,
        limit_train_batches=batches,
        limit_val_batches=batches,
        limit_test_batches=batches,
        limit_predict_batches=batches,
    )
