"""`Sharder`: gives a module the form in which it is trained in shards, block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from raytrainer.errors import ConfigurationError
from raytrainer.plan.sharding_settings import FSDP
from raytrainer.private.fsdp_private import drop_forward_hooks
from raytrainer.private.torch_private import BATCH_NORMS
from raytrainer.strategies.lost_edits import watch_block
from raytrainer.strategies.materialising import Materialiser
from raytrainer.strategies.recomputing import recomputed
from raytrainer.strategies.sharding_blocks import find_blocks, refuse_tied
from raytrainer.strategies.sharding_refusals import refuse_apart, refuse_left_to_user, refuse_mixed, refuse_unfit
from raytrainer.strategies.shards import local_part

__all__ = ["Sharder"]

#: What parameters are gathered as, by precision. Gradients are always reduced in float32 then.
_GATHERED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "float8": torch.bfloat16}
_HALF = ("bf16-true", "16-true", *_GATHERED)


class Sharder:
    """Calls torch's `fully_shard` on a module's blocks, and on its root for what is in none.

    Args:
        settings: The strategy's.
        mesh: The workers that shards are on, in one dimension, or in two: copies by shards.
        precision: Of the run.
        compiles: Options of torch.compile, for each block; None: not compiled.
    """

    def __init__(self, settings: FSDP, mesh: Any, precision: str, compiles: dict[str, Any] | None) -> None:
        self.settings, self.mesh, self.compiles = settings, mesh, compiles
        reduce = torch.float32 if precision in _HALF else None
        self._policy = MixedPrecisionPolicy(param_dtype=_GATHERED.get(precision), reduce_dtype=reduce)
        # the root's forward pass is the step, which runs under autocast, and whose targets stay what they are
        self._root_policy = dataclasses.replace(self._policy, cast_forward_inputs=False)

    def shard(self, module: nn.Module, convert: Callable[[nn.Module], None], materialiser: Materialiser) -> str:
        """Do so; return a line that says how.

        Args:
            module: The root, anywhere.
            convert: Casts it to the run's precision.
            materialiser: Makes parts real that are on the meta device.
        """
        blocks: dict[str, Any]
        refuse_unfit(module)
        if isinstance(module, FSDPModule):
            name = type(module).__name__.removeprefix("FSDP")
            raise ConfigurationError(
                f"fsdp: configure_model calls fully_shard on {name} itself: leave that out. The strategy shards what "
                f"is in no part that configure_model has sharded."
            )
        _lay_out(module)
        if any(isinstance(part, FSDPModule) for part in module.modules()):  # by the user's configure_model
            refuse_left_to_user(self.settings, self.compiles is not None)
            convert(module)
            blocks = {name: part for name, part in _sharded_parts(module).items() if name}
            for name, block in blocks.items():
                materialiser.make(block, {n: inner for n, inner in blocks.items() if n.startswith(f"{name}.")})
        else:
            blocks = dict(find_blocks(module, self.settings.blocks))
            refuse_tied(module, blocks)
            convert(module)
            for block in blocks.values():
                materialiser.make(block, {})
                self._wrap(block)
                self._norms(block)
                refuse_mixed(block, _sharded_parts(block))
                self._shard(block, self.settings.reshard_after_forward)
        materialiser.make(module, blocks)
        self._norms(module)
        refuse_mixed(module, _sharded_parts(module))
        drop_forward_hooks(module, lambda: self._shard(module, None, self._root_policy))
        refuse_apart(module, _sharded_parts(module), self.mesh)
        for name, block in blocks.items():
            watch_block(name, block)
        self._prefetch(list(blocks.values()))
        return self._describe(module, blocks)

    def _wrap(self, block: nn.Module) -> None:
        """Recompute, and compile, a block: inside of what FSDP does around it."""
        forward, compiles = block.forward, self.compiles
        if self.settings.activation_checkpointing:
            forward = recomputed(block, forward, compiles)
        elif compiles is not None:
            forward = torch.compile(forward, **compiles)
        if forward is not block.forward:
            block.__dict__["forward"] = forward

    def _norms(self, module: nn.Module) -> None:
        """Batch normalisation keeps float32, as under autocast without shards."""
        if self._policy.param_dtype is None:
            return
        for part in module.modules():
            if isinstance(part, BATCH_NORMS) and not isinstance(part, FSDPModule) and part.affine:
                policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
                self._shard(part, self.settings.reshard_after_forward, policy)

    def _shard(
        self, module: nn.Module, reshard_after_forward: bool | int | None, policy: MixedPrecisionPolicy | None = None
    ) -> None:
        offload = CPUOffloadPolicy() if self.settings.cpu_offload else OffloadPolicy()
        fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=policy or self._policy,
            offload_policy=offload,
        )

    def _prefetch(self, blocks: list[Any]) -> None:
        ahead = self.settings.prefetch
        if ahead is None:
            return
        for index, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + ahead])
            block.set_modules_to_backward_prefetch(blocks[max(0, index - ahead) : index][::-1])

    def _describe(self, module: nn.Module, blocks: Mapping[str, nn.Module]) -> str:
        parameters = list(module.parameters())
        count = sum(p.numel() for p in parameters)
        mine = sum(local_part(p).numel() * p.element_size() for p in parameters)
        copies = self.mesh.size(0) if self.mesh.ndim == 2 else 1
        shards = self.mesh.size() // copies
        of = sorted({type(block).__name__.removeprefix("FSDP") for block in blocks.values()})
        found = f"{len(blocks)} blocks ({', '.join(of)})" if len(blocks) != 1 else f"1 block ({of[0]})"
        if not blocks:
            found = "no blocks, so that all is gathered at once: name some with FSDP(blocks=...)"
        times = f", {copies} times" if copies > 1 else ""
        return (
            f"fsdp: {count:,} parameters in {shards} shard{'s' if shards > 1 else ''}{times}, "
            f"{mine / 2**20:,.1f} MiB of them on each worker; {found}"
        )


def _lay_out(module: nn.Module) -> None:
    """Shards are rows: have parameters in another order of memory (channels_last) lie row by row."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def _sharded_parts(module: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in module.named_modules() if isinstance(part, FSDPModule)}
