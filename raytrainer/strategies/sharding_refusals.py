"""What torch's `fully_shard` cannot do with a module, told before training with the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from raytrainer.errors import ConfigurationError
from raytrainer.plan.folding import few
from raytrainer.plan.sharding_settings import FSDP
from raytrainer.private.fsdp_private import averaged_over

__all__ = [
    "explained",
    "refuse_apart",
    "refuse_hooks",
    "refuse_left_to_user",
    "refuse_mixed",
    "refuse_sharded_loss",
    "refuse_unfit",
]


def refuse_unfit(module: nn.Module) -> None:
    """Refuse parameters that cannot be sharded.

    Raises:
        ConfigurationError: Names them.
    """
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ConfigurationError(
            f"fsdp: {_shown(lazy)} have no shape yet (lazy modules): call the module with one batch before fit."
        )
    scalars = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ConfigurationError(
            f"fsdp: {_shown(scalars)} have no dimension, along which they could be cut: give them one, as "
            f"nn.Parameter(torch.tensor([1.0])), or make them buffers if they do not train."
        )
    empty = [name for name, p in module.named_parameters() if p.numel() == 0 and p.requires_grad]
    if empty:  # whose gradients torch cannot reduce
        raise ConfigurationError(
            f"fsdp: {_shown(empty)} have no elements: leave them out (None), or freeze them (requires_grad_(False))."
        )
    sparse = [name for name, part in module.named_modules() if getattr(part, "sparse", None) is True]
    if sparse:
        raise ConfigurationError(
            f"fsdp: {_shown(sparse)} give sparse gradients (sparse=True), which cannot be averaged in shards: leave "
            f'sparse out, or use strategy="ddp".'
        )
    renormed = [name for name, part in module.named_modules() if getattr(part, "max_norm", None) is not None]
    if renormed:
        raise ConfigurationError(
            f"fsdp: {_shown(renormed)} change their weights in the forward pass (max_norm), which is lost with what "
            f'was gathered for it: leave max_norm out and limit norms in on_train_batch_end, or use strategy="ddp".'
        )
    refuse_hooks(module)


def refuse_hooks(module: nn.Module) -> None:
    """Refuse hooks on gradients of parameters: FSDP computes gradients of other tensors, whose hooks they are not.

    Raises:
        ConfigurationError: Names the parameters.
    """
    hooked = [name for name, parameter in module.named_parameters() if parameter._backward_hooks]
    if hooked:
        raise ConfigurationError(
            f"fsdp: register_hook was called on {_shown(hooked)}; such a hook is never called, since gradients arise "
            f"elsewhere and come to the shards when they are averaged. Use register_post_accumulate_grad_hook, in "
            f"configure_optimizers, or change gradients in on_before_optimizer_step."
        )


def refuse_mixed(module: nn.Module, within: Mapping[str, nn.Module]) -> None:
    """Refuse parameters of several types that would be gathered together, if they train.

    Args:
        module: What is gathered together, but for what is `within` parts of it.
        within: Those, by name.

    Raises:
        ConfigurationError: Names one of each type.
    """
    apart = {id(parameter) for part in within.values() if part is not module for parameter in part.parameters()}
    kinds: dict[object, str] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in apart:
            kinds.setdefault(parameter.dtype, name)
    if len(kinds) > 1:
        shown = ", ".join(f"{name!r} ({str(dtype).removeprefix('torch.')})" for dtype, name in kinds.items())
        raise ConfigurationError(
            f"fsdp: parameters of several types would be gathered together: {shown}, of a {type(module).__name__}. "
            f"Give them one type, or name blocks that keep them apart: FSDP(blocks=[...]); those that do not train "
            f"(requires_grad=False) may be of any."
        )


def refuse_apart(module: nn.Module, parts: Mapping[str, nn.Module], mesh: Any) -> None:
    """Refuse parameters whose gradients would not be averaged over all workers, so that these drift apart.

    Args:
        module: All of it, in shards.
        parts: What of it `fully_shard` was called on.
        mesh: Over which they are to be averaged.

    Raises:
        ConfigurationError: Names them.
    """
    over = {place: n for part in parts.values() for place, n in averaged_over(part).items()}
    workers = int(mesh.size())
    trained = {
        f"{path}.{name}" if path else name: over.get((id(part), name), 1)
        for path, part in module.named_modules()
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.requires_grad
    }
    wrong = {name: found for name, found in trained.items() if found != workers}
    if not wrong or not over:
        return
    whole = [name for name, found in wrong.items() if found == 1]
    if whole:
        raise ConfigurationError(
            f"fsdp: {_shown(whole)} are in no shards (ignored_params of fully_shard, or a mesh of one worker), so that "
            f"each of {workers} workers would train its own: leave them to fully_shard, or freeze them."
        )
    axes = ", ".join(f'"{name}"' for name in (mesh.mesh_dim_names or ()))
    raise ConfigurationError(
        f"fsdp: gradients of {_shown(wrong)} would be averaged over {next(iter(wrong.values()))} of {workers} workers: "
        f"in configure_model give fully_shard mesh=self.device_mesh[{axes}]."
    )


def refuse_left_to_user(settings: FSDP, compiles: bool) -> None:
    """Refuse what is asked for of blocks, where `configure_model` makes its own with `fully_shard`.

    Raises:
        ConfigurationError: Says where to do it instead.
    """
    remedies = {
        "blocks": "they are what it calls fully_shard on",
        "reshard_after_forward": "give it to fully_shard there",
        "activation_checkpointing": "have their forward call torch.utils.checkpoint.checkpoint there",
        "prefetch": "call set_modules_to_forward_prefetch there",
    }
    given = {name: getattr(settings, name) for name in remedies}
    asked = {f"{settings.shown}({n}={v!r})": remedies[n] for n, v in given.items() if v != getattr(FSDP(), n)}
    if compiles:
        asked["Trainer(compile=...)"] = "call each one's compile() before fully_shard there"
    if asked:
        which, remedy = next(iter(asked.items()))
        raise ConfigurationError(
            f"{which}: configure_model calls fully_shard on blocks itself, of which this would do nothing: {remedy}, "
            f"and leave it out here."
        )


_WHOLE_WHEN = (
    "With fsdp a block's parameters are whole only while the block's forward runs. Call the block rather than a part "
    "of it, or name its parts as blocks: FSDP(blocks=[...]). What sums up parameters, such as a penalty, belongs into "
    "the block's forward, or into the optimizer (weight_decay)."
)


@contextmanager
def explained() -> Iterator[None]:
    """Add to torch's complaint about shards among whole tensors what that means here."""
    try:
        yield
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" in str(error):
            error.add_note(_WHOLE_WHEN)
        raise


def refuse_sharded_loss(loss: object, mesh: Any) -> None:
    """Refuse a loss that is computed of shards: its backward pass would go past what averages gradients.

    One of layers that are split (torch's `loss_parallel`) is the same on all workers that split them.

    Args:
        loss: What the step has returned.
        mesh: Of all workers; its last dimension splits layers.

    Raises:
        ConfigurationError: It is one.
    """
    if isinstance(loss, DTensor) and loss.device_mesh.mesh_dim_names != mesh.mesh_dim_names[-1:]:
        raise ConfigurationError(f"training_step has computed its loss from parameters in shards. {_WHOLE_WHEN}")


def _shown(names: Iterable[str]) -> str:
    return few([repr(name) for name in names], 5)
