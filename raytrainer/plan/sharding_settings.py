"""Strategies for models larger than one GPU, as objects: `Trainer(strategy=FSDP(replicate="nodes"))`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

from raytrainer.errors import ConfigurationError
from raytrainer.plan import argument_checks as checks

__all__ = ["FSDP", "ModelParallel", "seconds_to_wait"]


@dataclass(frozen=True, kw_only=True)
class FSDP:
    """Parameters, gradients and optimizer states in shards, one a worker (torch's `fully_shard`, FSDP2).

    Each worker has its own batch, as with `DDP`, and gradients are averaged over all. A block's parameters are gathered
    right before it runs and dropped right after, so that a worker needs memory for its share of everything, and for
    one or two blocks at a time.

    Args:
        blocks: What is gathered at a time: classes, names of classes, or names of modules, in which "*" stands for
            anything ("layers.*"). None: found; the members of each `ModuleList` (or `Sequential` of modules with parts)
            whose members are of one class, and the `_no_split_modules` of models from transformers. What is in no
            block stays gathered for the whole step. A module whose `configure_model` calls `fully_shard` itself is left
            as it is, and what it has not sharded is sharded with its root.
        replicate: Keep several copies of the shards, and average gradients over them (HSDP): "nodes": one a node, or
            a number of copies. None: one.
        reshard_after_forward: Whether blocks are dropped after the forward pass and gathered again for the backward
            pass; a number: gathered among so many workers (no step may return None then). None: they are dropped,
            except what is in no block.
        cpu_offload: Keep shards, gradients and optimizer states in main memory. GPUs only.
        activation_checkpointing: Compute each block's activations anew in the backward pass instead of keeping them.
        prefetch: Blocks to gather ahead of the one that runs. None: torch's choice.
        check_replicas: At the end of epochs, compare what several workers hold (copies of shards, parameters that
            `ModelParallel` does not split, buffers that rank 0 leaves alone), and what optimizers go by, steps
            included; raise `DisagreementError` where they differ. As with `DDP`.
        process_group_timeout: Seconds, or a timedelta, that a collective waits for the other workers.

    Raises:
        ConfigurationError: A value is not allowed.
    """

    name: ClassVar[str] = "fsdp"

    blocks: Any = None
    replicate: str | int | None = None
    reshard_after_forward: bool | int | None = None
    cpu_offload: bool = False
    activation_checkpointing: bool = False
    prefetch: int | None = None
    check_replicas: bool = True
    process_group_timeout: float | timedelta = 1800.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _blocks(self.blocks))
        for name in ("cpu_offload", "activation_checkpointing", "check_replicas"):
            checks.boolean(f"{self.shown}: {name}", getattr(self, name))
        _copies(self.shown, self.replicate)
        reshard = self.reshard_after_forward
        if reshard is not None and not isinstance(reshard, bool) and not (isinstance(reshard, int) and reshard > 1):
            raise ConfigurationError(
                f"{self.shown}: reshard_after_forward={reshard!r}: give True, False, None, or a number of workers "
                f"above 1."
            )
        if self.prefetch is not None:
            checks.count(f"{self.shown}: prefetch", self.prefetch, least=1)
        object.__setattr__(self, "process_group_timeout", seconds_to_wait(self.process_group_timeout))

    @property
    def timeout_seconds(self) -> float:
        return float(self.process_group_timeout)  # type: ignore[arg-type]  # normal since __post_init__

    @property
    def shown(self) -> str:
        """Its name in messages."""
        return type(self).__name__

    def copies_on(self, num_nodes: int) -> int:
        """How many copies of the shards there are to be."""
        return 1 if self.replicate is None else num_nodes if self.replicate == "nodes" else int(self.replicate)

    def layout(self, num_nodes: int, world_size: int) -> tuple[int, int, int]:
        """How workers are laid out: copies, workers that a copy's shards are on, workers that split a layer.

        Raises:
            ConfigurationError: Workers cannot be divided so.
        """
        copies = self.copies_on(num_nodes)
        if world_size % copies:
            raise ConfigurationError(
                f"{self.shown}(replicate={self.replicate!r}) with {world_size} workers: their number must be a "
                f"multiple of it."
            )
        shards = world_size // copies
        if copies > 1 and shards == 1:
            raise ConfigurationError(
                f"{self.shown}(replicate={self.replicate!r}) with {world_size} workers, each of which would have the "
                f'whole module: that is strategy="ddp"; give fewer copies, or none.'
            )
        self._check_reshard(shards)
        return copies, shards, 1

    def _check_reshard(self, shards: int) -> None:
        reshard = self.reshard_after_forward
        if isinstance(reshard, int) and not isinstance(reshard, bool) and (shards % reshard or reshard >= shards):
            raise ConfigurationError(
                f"{self.shown}(reshard_after_forward={reshard}) with shards on {shards} workers: give a number that "
                f"divides {shards} and is below it, True or False."
            )


@dataclass(frozen=True, kw_only=True)
class ModelParallel(FSDP):
    """Layers split over `tensor` workers, which compute each batch together; what they hold in shards over `data`.

    The module's `configure_model` says how layers are split, with torch's `parallelize_module` and
    `self.device_mesh["tensor_parallel"]`, as for Lightning's `ModelParallelStrategy`. It may call `fully_shard` with
    `self.device_mesh["data_parallel"]` too; else this is done as with `FSDP`, whose other arguments hold here too.

    Workers of one part of the data have neighbouring ranks, and read the same batches.

    Args:
        tensor: Workers that split layers. None: as many as `data` and `replicate` leave; without either, those of a
            node.
        data: Workers that shards are on, each with batches of its own. None: as many as are left.
        replicate: Copies of all that, each with batches of its own: "nodes", a number, or None for one. They are the
            mesh's first dimension, "replicate", where there are several.

    Raises:
        ConfigurationError: A value is not allowed.
    """

    name: ClassVar[str] = "model_parallel"

    tensor: int | None = None
    data: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tensor", "data"):
            if getattr(self, name) is not None:
                checks.count(f"{self.shown}: {name}", getattr(self, name), least=1)

    def layout(self, num_nodes: int, world_size: int) -> tuple[int, int, int]:
        copies = self.copies_on(num_nodes)
        given = f"ModelParallel(tensor={self.tensor}, data={self.data}, replicate={self.replicate!r})"
        known = copies * (self.tensor or 1) * (self.data or 1)
        whole = self.tensor is not None and self.data is not None
        if world_size % known or (whole and known != world_size):
            raise ConfigurationError(
                f"{given} with {world_size} workers: their number must be the product"
                f"{'' if whole else ', or a multiple of it'}; leave tensor or data out, and it is what others leave."
            )
        if self.tensor is None and self.data is None:
            tensor = max(1, world_size // max(copies, num_nodes))
        else:
            tensor = self.tensor or world_size // known
        data = self.data or world_size // copies // tensor
        if copies > 1 and data == 1:
            raise ConfigurationError(
                f"{given} with {world_size} workers: nothing would be in shards, as data is 1; give data={copies} "
                f"instead of replicate."
            )
        self._check_reshard(data)
        return copies, data, tensor


def _blocks(blocks: Any) -> tuple[Any, ...] | None:
    """Classes and names, in a tuple."""
    if blocks is None:
        return None
    items = (blocks,) if isinstance(blocks, (str, type)) else blocks
    wrong = not isinstance(items, (Sequence, set, frozenset)) or any(
        not isinstance(item, (str, type)) or not item for item in items
    )
    if wrong or not items:
        raise ConfigurationError(
            f'FSDP: blocks={blocks!r}: give classes of modules, their names, or names of modules such as "layers.*", '
            f"one or several; None: they are found."
        )
    return tuple(items)


def _copies(who: str, replicate: Any) -> None:
    number = isinstance(replicate, int) and not isinstance(replicate, bool) and replicate >= 1
    if replicate is not None and replicate != "nodes" and not number:
        raise ConfigurationError(f'{who}: replicate={replicate!r}: give "nodes", a number of copies, or None.')


def seconds_to_wait(timeout: Any) -> float:
    """A `process_group_timeout` in seconds.

    Raises:
        ConfigurationError: It is none.
    """
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not number or not math.isfinite(seconds) or seconds <= 0:
        raise ConfigurationError(f"process_group_timeout={timeout!r}: give seconds above 0, or a timedelta.")
    return float(seconds)
