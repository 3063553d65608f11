"""Strategies as objects: `Trainer(strategy=DDP(find_unused_parameters=True))`. A name alone stands for the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

from raytrainer.errors import ConfigurationError
from raytrainer.plan import argument_checks as checks
from raytrainer.plan.names_elsewhere import EXPORTED, STRATEGIES_ELSEWHERE
from raytrainer.plan.sharding_settings import FSDP, ModelParallel, seconds_to_wait
from raytrainer.plan.strangers import is_lightnings

__all__ = ["DDP", "DDP2", "DP", "STRATEGIES", "effective_batch", "parse_strategy"]

STRATEGIES = ("auto", "local", "ddp", "ddp_cpu", "ddp_spawn", "ddp2", "dp", "fsdp", "model_parallel")


@dataclass(frozen=True, kw_only=True)
class DDP:
    """One batch per worker; gradients are averaged over all workers (torch's DistributedDataParallel).

    Args:
        find_unused_parameters: Look in each step for parameters that the loss does not depend on. Needed where that
            happens; slower.
        static_graph: The same parameters are used, in the same way, in every step: allows checkpointed activations, and
            unused parameters without a search.
        bucket_cap_mb: MiB of gradients that are averaged together [torch's: 25].
        gradient_as_bucket_view: Gradients live in the buckets, which saves memory and a copy.
        broadcast_buffers: Every forward pass in training begins with rank 0's buffers.
        check_replicas: At the end of epochs, compare the workers' weights, and what their optimizers go by (lr, ...),
            and raise `DisagreementError` where they differ (a checksum; at most about 0.1 % of a run's time, so that
            short epochs share one).
        gradient_compression: Send gradients as "bf16" (GPUs only) or "fp16": half the bytes, rounded. None: as they
            are.
        process_group_timeout: Seconds, or a timedelta, that a collective waits for the other workers.

    Raises:
        ConfigurationError: A value is not allowed.
    """

    name: ClassVar[str] = "ddp"

    find_unused_parameters: bool = False
    static_graph: bool = False
    bucket_cap_mb: float | None = None
    gradient_as_bucket_view: bool = True
    broadcast_buffers: bool = True
    check_replicas: bool = True
    gradient_compression: str | None = None
    process_group_timeout: float | timedelta = 1800.0

    def __post_init__(self) -> None:
        for name in (
            "find_unused_parameters", "static_graph", "gradient_as_bucket_view", "broadcast_buffers", "check_replicas",
        ):  # fmt: skip
            checks.boolean(f"{type(self).__name__}: {name}", getattr(self, name))
        checks.number("bucket_cap_mb", self.bucket_cap_mb, above=0.0)
        checks.choice("gradient_compression", self.gradient_compression, (None, "bf16", "fp16"))
        object.__setattr__(self, "process_group_timeout", seconds_to_wait(self.process_group_timeout))

    @property
    def timeout_seconds(self) -> float:
        return float(self.process_group_timeout)  # type: ignore[arg-type]  # normal since __post_init__

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for torch's DistributedDataParallel."""
        options: dict[str, Any] = {
            "find_unused_parameters": self.find_unused_parameters,
            "static_graph": self.static_graph,
            "gradient_as_bucket_view": self.gradient_as_bucket_view,
        }
        if not self.broadcast_buffers:  # newer versions of torch warn where it is given at all
            options["broadcast_buffers"] = False
        return options if self.bucket_cap_mb is None else {**options, "bucket_cap_mb": self.bucket_cap_mb}


@dataclass(frozen=True, kw_only=True)
class DDP2(DDP):
    """One batch per node, split over its workers; `*_step_end` sees the node's whole batch. Arguments as for `DDP`."""

    name: ClassVar[str] = "ddp2"


@dataclass(frozen=True, kw_only=True)
class DP(DDP):
    """One batch for the whole job, split over the workers of one node. Arguments as for `DDP`."""

    name: ClassVar[str] = "dp"


_OBJECTS: dict[str, type[DDP | FSDP]] = {"ddp2": DDP2, "dp": DP, "fsdp": FSDP, "model_parallel": ModelParallel}


def parse_strategy(value: Any) -> tuple[str, DDP | FSDP]:
    """The name of a strategy, and its settings.

    Raises:
        ConfigurationError: No such strategy.
    """
    if isinstance(value, (DDP, FSDP)):
        return value.name, value
    if isinstance(value, type) and issubclass(value, (DDP, FSDP)):
        raise ConfigurationError(f"strategy={value.__name__}: give an object, {value.__name__}(), or its name.")
    if isinstance(value, str) and value in STRATEGIES_ELSEWHERE:
        raise ConfigurationError(f"strategy={value!r}: here that is {STRATEGIES_ELSEWHERE[value]}.")
    if is_lightnings(value, "Strategy"):
        name = type(value).__name__
        here = EXPORTED.get(name, "a name or an object of raytrainer's")
        raise ConfigurationError(f"strategy={name}(...) is Lightning's: here that is {here}.")
    checks.choice(
        "strategy", value, STRATEGIES, "Or an object: DDP(...), DDP2(...), DP(...), FSDP(...), ModelParallel(...)."
    )
    return value, _OBJECTS.get(value, DDP)()


def effective_batch(batch_size: int | None, parts: int, accumulate: int, strategy: str) -> str | None:
    """A line that says how many samples make a step; None where the loader does not tell its batch size.

    Args:
        batch_size: Samples in a loader's batch.
        parts: Batches that are read at the same time: one per worker (ddp), per node (ddp2), per group of workers that
            split layers (model_parallel), or one (dp).
        accumulate: Batches per step.
        strategy: Its name, which says whether a worker, a node or the whole job reads a batch.

    Example:
        "16 samples a batch x 2 nodes x 4 accumulated = 128 samples a step"
    """
    if batch_size is None:
        return None
    unit = {"ddp2": "node", "dp": "job", "model_parallel": "group of workers"}.get(strategy, "worker")
    several = "groups of workers" if unit.startswith("group") else f"{unit}s"
    factors = [f"{batch_size} samples a batch"]
    if unit == "job":
        factors.append("1 for the whole job")
    else:
        factors.append(f"{parts} {unit if parts == 1 else several}")
    if accumulate > 1:
        factors.append(f"{accumulate} accumulated")
    return f"{' x '.join(factors)} = {batch_size * parts * accumulate} samples a step"
