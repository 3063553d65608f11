"""Every private interface of torch's `fully_shard` (FSDP2) that this package uses, and what if it is gone.

All were seen in torch 2.13.0 (CPU) and 2.11.0 (CUDA). Where one is gone, the function that needs it raises a
`ConfigurationError` that says what cannot be done; training itself needs `drop_forward_hooks` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from raytrainer.errors import ConfigurationError

__all__ = [
    "accumulated_gradients",
    "averaged_over",
    "drop_forward_hooks",
    "drop_gathered",
    "edited_while_gathered",
    "found_infinities",
    "hooks_after_accumulation",
    "is_gathered",
    "own_parameters",
    "put_accumulated_gradients",
    "reduce_zeros",
    "wind_up_backward",
]


def _gone(what: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(f"This torch ({torch.__version__}) does not let {what}: {error}.")


def _groups(module: nn.Module) -> list[Any]:
    """What a module gathers at a time; newer versions of torch may have several."""
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        group = state._fsdp_param_group
        groups = [] if group is None else [group]
    return list(groups)


def _named(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each parameter that a module gathers by itself, by its name within the whole."""
    for group in _groups(module):
        for parameter in group.fsdp_params:
            yield parameter._param_fqn, parameter


def drop_forward_hooks(module: nn.Module, shard: Callable[[], None]) -> None:
    """Have a module sharded without its own forward passes counting as steps of FSDP.

    `shard` calls `fully_shard(module)`, whose hooks are then taken off again.

    Without `_forward_pre_hooks`: an error.
    """
    try:
        before, after = set(module._forward_pre_hooks), set(module._forward_hooks)
        shard()
        for hooks, kept in ((module._forward_pre_hooks, before), (module._forward_hooks, after)):
            for key in set(hooks) - kept:
                del hooks[key]
        for key in set(module._forward_pre_hooks_with_kwargs) - set(module._forward_pre_hooks):
            del module._forward_pre_hooks_with_kwargs[key]
    except AttributeError as error:
        raise _gone("a training step be what FSDP takes for the forward pass", error) from None


def own_parameters(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the parameters are that a module gathers by itself: (part of it, attribute)."""
    try:
        found = []
        for parameter in (each for group in _groups(module) for each in group.fsdp_params):
            info = parameter._module_info
            found.append((info.module, info.param_name))
            found += zip(info.shared_modules, info.shared_param_names, strict=True)
        return found
    except AttributeError as error:
        raise _gone("it be known which parameters FSDP gathers together", error) from None


def averaged_over(module: nn.Module) -> dict[tuple[int, str], int]:
    """Over how many workers the gradients of what a module gathers by itself are averaged.

    By the id of the part that has a parameter, and its name there: the parameter itself may be replaced. {} where it
    cannot be known.
    """
    found: dict[tuple[int, str], int] = {}
    with contextlib.suppress(AttributeError):
        for group in _groups(module):
            for parameter in group.fsdp_params:
                info = parameter._module_info
                places = zip(
                    (info.module, *info.shared_modules), (info.param_name, *info.shared_param_names), strict=True
                )
                found |= {(id(part), name): int(parameter.mesh_info.mesh.size()) for part, name in places}
    return found


def is_gathered(module: nn.Module) -> bool:
    """Whether the parameters that a module gathers by itself are whole now. Without the attribute: False."""
    groups = _groups(module)
    return bool(groups) and all(getattr(group, "is_unsharded", False) for group in groups)


def drop_gathered(module: nn.Module) -> None:
    """Have a module's parameters be shards, also in the midst of a step, in which its `reshard` may do nothing.

    Without the method: an error.
    """
    try:
        for group in _groups(module):
            group._to_sharded()
    except AttributeError as error:
        raise _gone("an optimizer step in the midst of a training step", error) from None


def edited_while_gathered(module: nn.Module) -> list[str]:
    """Parameters whose gathered numbers are not those of the shard that this worker has: they are dropped in the end.

    Names within the whole; [] where it cannot be known.
    """
    found = []
    with contextlib.suppress(AttributeError):
        for name, parameter in _named(module):
            whole, shard = parameter._unsharded_param, parameter._sharded_param_data
            if type(whole) is not nn.Parameter and not isinstance(whole, DTensor):
                continue  # gathered in a form of its own
            whole = whole.to_local() if isinstance(whole, DTensor) else whole.detach()
            mesh = parameter.mesh_info
            chunks = whole.chunk(mesh.shard_mesh_size, dim=parameter.fsdp_placement.dim)
            own = (chunks[mesh.shard_mesh_rank] if mesh.shard_mesh_rank < len(chunks) else whole[:0]).reshape(-1)
            held = shard[: own.numel()].to(own.device, own.dtype)
            if not torch.equal(own, held) and not torch.equal(own.nan_to_num(), held.nan_to_num()):
                found.append(name)
    return found


def reduce_zeros(module: nn.Module) -> None:
    """Take part in the reduction of a module's gradients with zeros, where this worker has none.

    Its parameters must be gathered. Gradients that have been accumulated before are part of it.
    """
    try:
        for group in _groups(module):
            for parameter in group.fsdp_params:
                whole = parameter._unsharded_param
                if whole.requires_grad and whole.grad is None and parameter.unsharded_accumulated_grad is None:
                    whole.grad = torch.zeros_like(whole)
            group.post_backward()
    except AttributeError as error:
        raise _gone("a worker skip a batch", error) from None


def wind_up_backward(module: nn.Module) -> None:
    """End a backward pass that this worker has taken part in without one of its own."""
    try:
        module._get_fsdp_state()._root_post_backward_final_callback()  # type: ignore[operator]
    except AttributeError as error:
        raise _gone("a worker skip a batch", error) from None


def accumulated_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients that wait on this worker for the batch that ends an accumulation, by names of parameters."""
    found: dict[str, Tensor] = {}
    try:
        for name, parameter in _named(module):
            gradient = parameter.unsharded_accumulated_grad
            if gradient is None and hasattr(parameter, "_unsharded_param"):
                gradient = parameter._unsharded_param.grad
            if isinstance(gradient, DTensor):  # of a layer that is split
                placements = parameter._unsharded_param.placements
                gradient = gradient.redistribute(placements=placements).to_local()
            if gradient is not None:
                found[name] = gradient.detach()
    except AttributeError as error:
        raise _gone("a state be saved between the batches of an accumulation", error) from None
    return found


def put_accumulated_gradients(module: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """The reverse. The module's parameters must have been gathered before."""
    try:
        for name, parameter in _named(module):
            if name in gradients:
                whole = parameter._unsharded_param
                value = gradients[name].to(whole.device, copy=True)
                if isinstance(whole, DTensor):
                    value = DTensor.from_local(value, whole.device_mesh, whole.placements, run_check=False)
                if value.dtype == whole.dtype:
                    whole.grad = value
                else:
                    parameter.unsharded_accumulated_grad = value
    except AttributeError as error:
        raise _gone("a state be taken up between the batches of an accumulation", error) from None


def found_infinities(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> list[Tensor]:
    """What `unscale_` has found, one number a device: non-zero if a gradient is not finite. To be changed in place."""
    try:
        found = scaler._found_inf_per_device(optimizer)
        return [value.to_local() if hasattr(value, "to_local") else value for value in found.values()]
    except AttributeError as error:
        raise _gone("workers agree on infinite gradients", error) from None


def hooks_after_accumulation(parameter: Tensor) -> dict[int, Callable[[Tensor], None]]:
    """What `register_post_accumulate_grad_hook` was given for a parameter, to be changed in place. Without: {}."""
    return getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
