"""The frozen settings of a run: every argument validated, each in its one normal form."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from raytrainer.errors import ConfigurationError
from raytrainer.extras import not_installed
from raytrainer.plan import argument_checks as checks
from raytrainer.plan.declaring import checked
from raytrainer.plan.run_arguments import RunArguments
from raytrainer.plan.sharding_settings import FSDP
from raytrainer.plan.strategy_settings import DDP, parse_strategy

__all__ = ["STAGES", "Settings", "build_settings", "settle"]

log = logging.getLogger("raytrainer")

STAGES = ("fit", "validate", "test", "predict")


@dataclass(frozen=True, kw_only=True)
class Settings(RunArguments):
    """What a `Trainer` was asked for, as `settle` makes it. `RunArguments` says what each name means.

    Lengths of time are in seconds; all counts of batches are per worker; None means no such limit.

    Attributes:
        ddp: The settings of a strategy whose workers have the whole module each.
        sharding: Those of one that shards it; None with all others.
        accumulation: (first epoch, batches per step), in place of the one number `accumulate_grad_batches`.
        fewest_nodes: An elastic run goes on with as few nodes as this ...
        fewest_per_node: ... and as few workers on each.
    """

    if TYPE_CHECKING:  # what is narrower here than what may be given
        strategy: str
        num_nodes: int
        num_processes: int
        gpus: int | tuple[int, ...]  # -1: all of each node, a number that is known when a run begins
        min_epochs: int
        max_time: float | None  # type: ignore[assignment]  # seconds
        val_check_interval: int | float
        fast_dev_run: int
        gradient_clip_algorithm: str
        precision: str
        compile: dict[str, Any] | None
        log_every_n_steps: int
        snapshot_every: int | float | str | None  # type: ignore[assignment]  # steps, seconds or "auto"

    ddp: DDP = field(default_factory=DDP)
    sharding: FSDP | None = None
    accumulation: tuple[tuple[int, int], ...] = ()
    fewest_nodes: int = 1
    fewest_per_node: int = 1

    @property
    def overfit(self) -> bool:
        """Whether training and validation see the same few batches in each epoch."""
        return bool(self.overfit_batches)

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


def build_settings(*, cluster_attached: bool = False, **given: Any) -> Settings:
    """The settings of a Trainer that was given these arguments; see `settle`."""
    return settle(RunArguments(**given), cluster_attached)


def settle(arguments: RunArguments, cluster_attached: bool = False, **instead: Any) -> Settings:
    """Validate arguments, alone and in pairs, and bring each into its one normal form.

    Args:
        arguments: What the user gave.
        cluster_attached: Whether the driver already uses a Ray cluster, which `strategy="auto"` takes up.
        instead: Arguments whose value has been found out meanwhile.

    Raises:
        ConfigurationError: A value, or a pair of values, cannot work.
    """
    given = {declared.name: getattr(arguments, declared.name) for declared in fields(RunArguments)} | instead
    normal = checked(given, RunArguments)
    settings = Settings(
        **{
            **normal,
            "max_epochs": _max_epochs(given, normal),
            "min_epochs": 1 if normal["min_epochs"] is None else normal["min_epochs"],
            "val_check_interval": _val_check_interval(given, normal),
            # torchao's tensors cannot be cast under it
            "inference_mode": normal["inference_mode"] and normal["precision"] != "float8",
            "log_every_n_steps": normal["log_every_n_steps"] or 0,
            **_limits(given, normal),
            **_placement(given, cluster_attached),
        }
    )
    _refuse_contradictions(settings, given)
    return _for_fast_dev_run(settings)


def _refuse_contradictions(settings: Settings, given: dict[str, Any]) -> None:
    """Raise a ConfigurationError for pairs of values that cannot work; warn of those where one wins."""
    if settings.deterministic is True and settings.benchmark:
        raise ConfigurationError(
            "deterministic=True with benchmark=True: benchmarking picks kernels by their speed, which differs from "
            "run to run; drop one of the two."
        )
    on_cpus = not settings.on_gpu and settings.world_size > 1
    if settings.sync_batchnorm and on_cpus:
        raise ConfigurationError(
            f"sync_batchnorm=True with {settings.world_size} CPU workers: torch.nn.SyncBatchNorm works on GPUs only; "
            f"use gpus=..., or sync_batchnorm=False (each worker then normalises by its own samples)."
        )
    if settings.precision == "float8":
        # workers have an environment of their own, and tell of what is missing there
        if settings.strategy == "local" and find_spec("torchao") is None:
            raise not_installed('precision="float8"', "torchao", "float8", 'use precision="bf16-mixed"')
        if settings.sharding is not None and settings.sharding.layout(settings.num_nodes, settings.world_size)[2] > 1:
            raise ConfigurationError(
                'precision="float8" with layers that are split over workers (ModelParallel): use strategy="fsdp", or '
                'precision="bf16-mixed".'
            )
    if settings.ddp.gradient_compression == "bf16" and on_cpus:
        raise ConfigurationError(
            'gradient_compression="bf16" on CPUs: torch has it for NCCL only; use gpus=..., "fp16", or None.'
        )
    if settings.sharding is not None:
        settings.sharding.layout(settings.num_nodes, settings.world_size)
        if settings.sharding.cpu_offload and not settings.on_gpu:
            raise ConfigurationError("FSDP(cpu_offload=True) on CPUs: everything is in main memory there; drop it.")
    if settings.auto_select_gpus and (isinstance(settings.gpus, tuple) or settings.gpus < 1):
        raise ConfigurationError(
            f"auto_select_gpus=True with gpus={given['gpus']!r}: it picks GPUs that are free, so give their number; "
            f"with chosen ones, all or none there is nothing to pick."
        )
    if settings.max_steps is not None and given["max_epochs"] is not None:
        log.warning(
            "max_steps=%s and max_epochs=%s are both given: steps take precedence, so the run ends at %s steps.",
            settings.max_steps, given["max_epochs"], settings.max_steps,
        )  # fmt: skip


def _max_epochs(given: dict[str, Any], normal: dict[str, Any]) -> int | None:
    if given["max_epochs"] is None:
        return 1000 if normal["max_steps"] is None and normal["max_time"] is None else None
    epochs: int | None = normal["max_epochs"]
    return epochs


def _val_check_interval(given: dict[str, Any], normal: dict[str, Any]) -> int | float:
    interval: int | float = normal["val_check_interval"]
    if given["check_val_every_n_epoch"] is None and isinstance(interval, float):
        raise ConfigurationError(
            f"val_check_interval={interval!r} with check_val_every_n_epoch=None: batches are counted across epochs, "
            f"so give a number of batches as an int."
        )
    return interval


def _limits(given: dict[str, Any], normal: dict[str, Any]) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for stage in ("train", "val", "test", "predict"):
        name = f"limit_{stage}_batches"
        limits[name] = 1.0 if normal[name] is None else normal[name]
        if normal["overfit_batches"] and stage in ("train", "val"):
            if given[name] is not None:
                raise ConfigurationError(
                    f"overfit_batches={given['overfit_batches']!r} with {name}={given[name]!r}: overfit_batches "
                    f"already limits training and validation; give one of the two."
                )
            limits[name] = normal["overfit_batches"]
    return limits


def _placement(given: dict[str, Any], cluster_attached: bool) -> dict[str, Any]:
    """The strategy, and nodes and workers, which are judged together."""
    num_nodes, num_processes, gpus = given["num_nodes"], given["num_processes"], given["gpus"]
    strategy, options = parse_strategy(given["strategy"])
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
        "ddp": options if isinstance(options, DDP) else DDP(),
        "sharding": options if isinstance(options, FSDP) else None,
        "num_nodes": nodes,
        "num_processes": processes,
        "gpus": chosen,
        "fewest_nodes": fewest_nodes,
        "fewest_per_node": fewest_gpus or fewest_processes or count,
    }


def _for_fast_dev_run(settings: Settings) -> Settings:
    """n batches of every loader, one epoch, nothing written: a quick walk through every line of user code."""
    batches = settings.fast_dev_run
    if not batches:
        return settings
    return replace(
        settings,
        max_epochs=1,
        max_steps=None,
        max_time=None,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=1,
        val_check_interval=1.0,
        limit_train_batches=batches,
        limit_val_batches=batches,
        limit_test_batches=batches,
        limit_predict_batches=batches,
    )
