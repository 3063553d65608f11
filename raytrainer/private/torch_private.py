"""Every private interface of torch that this package uses, and what happens where it is gone.

All were seen in torch 2.13.0 (CPU) and 2.11.0 (CUDA). Each function says what it does without; a test takes the
interface away and looks.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from raytrainer.errors import ConfigurationError

__all__ = [
    "BATCH_NORMS",
    "Given",
    "abort_groups",
    "averaging_check",
    "compile_call",
    "copy_together",
    "drop_compiled",
    "fix_buckets",
    "forget_iterator",
    "forget_meshes",
    "is_compiled",
    "is_loader_iterator",
    "profiler_runs",
    "reduce_parametrized",
    "set_group_timeout",
    "take_iterator",
    "without_compiled",
]

log = logging.getLogger("raytrainer")

try:
    from torch.nn.modules.batchnorm import _BatchNorm

    #: What counts as batch normalisation. Without `_BatchNorm`: the classes that torch documents.
    BATCH_NORMS: Any = (_BatchNorm,)
except ImportError:
    BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


# ---------------------------------------------------------------- torch.distributed


def set_group_timeout(group: Any, seconds: float) -> None:
    """Let a process group's collectives wait so long for the other workers from now on.

    Without `_set_pg_timeout`: a warning, and the timeout that the group was made with.
    """
    try:
        from torch.distributed.distributed_c10d import _set_pg_timeout
    except ImportError:
        log.warning("This torch cannot change the timeout of a process group; collectives wait as long as before.")
        return
    _set_pg_timeout(timedelta(seconds=seconds), group)


def abort_groups() -> bool:
    """End every collective of this process, also those that another thread waits in; return whether that can be done.

    The groups are gone then. It ends what NCCL does, not what gloo does. Until this has returned, no other thread may
    use, leave or form a group. Without `_abort_process_group`, or with several groups of NCCL, out of which it does not
    come back (torch 2.11): False, and nothing happens.
    """
    try:
        from torch.distributed.distributed_c10d import _abort_process_group, _world
    except ImportError:
        return False
    if torch.distributed.is_initialized():
        if sum("nccl" in str(backend) for backend, *_ in _world.pg_map.values()) > 1:
            return False
        _abort_process_group()
    return True


def forget_meshes(device: torch.device) -> None:
    """Have operations on DTensors find out anew which mesh their results are on, in this thread and in backward passes.

    torch remembers it, by meshes that are equal where they have the same ranks. So in a later group of the same process
    results would be on a mesh of the earlier one, whose groups are gone, or are others' under the same names. Without
    the two functions: nothing, and a worker that goes on in another group may fail.
    """
    try:
        from torch.distributed.tensor.debug import _clear_fast_path_sharding_prop_cache as forget_here
        from torch.distributed.tensor.debug import _clear_python_sharding_prop_cache as forget_all
    except ImportError:
        return
    forget_all()
    forget_here()
    if device.type == "cuda":  # whose backward passes run in a thread of their own, as this one does
        number = torch.zeros((), device=device, requires_grad=True)
        number.register_hook(lambda gradient: forget_here())
        number.backward()


def fix_buckets(ddp: DistributedDataParallel) -> None:
    """Give gradients their places in DDP's buckets now rather than after the first backward pass, as DDP does.

    A run that resumes would otherwise have its first step with other places than the run that it continues, and sums
    that differ in their last bit. They lie in the order of DDP's numbers, which is the one in which gradients usually
    come. Without the reducer's `_rebuild_buckets`: just that difference, of which a line in the log tells.
    """
    push = getattr(ddp.reducer, "_push_all_rebuilt_params", None)
    rebuild = getattr(ddp.reducer, "_rebuild_buckets", None)
    if push is None or rebuild is None:
        log.info("This torch fixes DDP's buckets late: a resumed run may differ in the last bit of its first step.")
        return
    push()
    rebuild()


def averaging_check(ddp: DistributedDataParallel) -> Callable[[], None]:
    """What raises a RuntimeError where the latest backward pass has not brought DDP every gradient that it waits for.

    Without the reducer's `_check_reducer_finalized`: what raises nothing, and DDP's own error with a next batch.
    """
    check: Callable[[], None] | None = getattr(ddp.reducer, "_check_reducer_finalized", None)
    return check if check is not None else lambda: None


def copy_together(into: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    """Copy tensors into others, on a GPU in few kernels. Without `_foreach_copy_`: in one for each."""
    alike: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for place, tensor in zip(into, tensors, strict=True):
        alike.setdefault((tensor.device, tensor.dtype), []).append((place, tensor))
    for pairs in alike.values():
        places, own = map(list, zip(*pairs, strict=True))
        try:
            torch._foreach_copy_(places, own)
        except (AttributeError, NotImplementedError):  # on GPUs it knows no uint32, and other rare types
            list(map(torch.Tensor.copy_, places, own))


# ---------------------------------------------------------------- compiled modules


def is_compiled(part: nn.Module) -> bool:
    """Whether `nn.Module.compile` has been called on it, or it is what `torch.compile` makes of a module.

    Without `_compiled_call_impl` and `_orig_mod`: False.
    """
    return getattr(part, "_compiled_call_impl", None) is not None or "_orig_mod" in part._modules


def compile_call(part: nn.Module, options: dict[str, Any]) -> None:
    """Compile a module of torch's own in place: dynamo begins no graph in torch's code, so it gets a frame outside.

    Raises:
        ConfigurationError: This torch has no `_call_impl`.
    """
    plain: Callable[..., Any] | None = getattr(part, "_call_impl", None)
    if plain is None:
        raise ConfigurationError(
            f"compile=...: this torch ({torch.__version__}) does not let {type(part).__name__} be compiled in place; "
            f"wrap it in a module of your own, or leave compile out."
        )
    inner = plain

    def call(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    # a code object for each part, since dynamo keeps a limited number of graphs by code object
    call.__code__ = call.__code__.replace()
    part._compiled_call_impl = torch.compile(call, **options)


def drop_compiled(part: nn.Module) -> None:
    """Undo `compile_call` and `nn.Module.compile`."""
    part.__dict__.pop("_compiled_call_impl", None)


def without_compiled(attributes: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes without compiled code, which belongs to one process."""
    return {name: value for name, value in attributes.items() if name != "_compiled_call_impl"}


# ---------------------------------------------------------------- parametrized modules


def reduce_parametrized(value: Any) -> Any:
    """How to pickle a parametrized module (`spectral_norm`, `weight_norm`, one's own), which torch refuses; else None.

    Its class is made for it, with a property for each parametrized tensor. The copy is one of the class before that,
    with the same submodules (parametrizations are some), and is then given a class likewise. Without `parametrize`'s
    `_inject_new_class` and `_inject_property`: None, and torch says that it cannot be pickled.
    """
    if not isinstance(value, nn.Module) or not parametrize.is_parametrized(value):
        return None
    if not all(hasattr(parametrize, name) for name in ("_inject_new_class", "_inject_property")):
        return None
    base: Any = type(value).__bases__[0]
    return _new_module, (base,), base.__getstate__(value), None, None, _set_parametrized


def _new_module(base: type[nn.Module]) -> nn.Module:
    return base.__new__(base)


def _set_parametrized(module: Any, state: dict[str, Any]) -> None:
    module.__setstate__(state)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)


# ---------------------------------------------------------------- profiler


def profiler_runs() -> bool:
    """Whether a profiler of torch's records in this process.

    Without `_is_profiler_enabled`: True, and each step makes the marks that it would look for.
    """
    return getattr(torch.autograd.profiler, "_is_profiler_enabled", True)


# ---------------------------------------------------------------- DataLoader


def forget_iterator(loader: DataLoader[Any]) -> None:
    """Have a loader with persistent processes start new ones when it is next iterated.

    Without `_iterator`: nothing changes but a name that nobody reads.
    """
    loader.__dict__["_iterator"] = None


def take_iterator(loader: DataLoader[Any]) -> Any:
    """The iterator that a loader with persistent processes keeps, which it then has no more; None: it has none.

    Without `_iterator`: None, and Python's collector ends the processes some time later.
    """
    return loader.__dict__.pop("_iterator", None)


def is_loader_iterator(thing: Any) -> bool:
    """Whether it is what a DataLoader reads with.

    Without `_BaseDataLoaderIter`: never, so that loaders which keep such a reader are not noticed.
    """
    return any(kind.__name__ == "_BaseDataLoaderIter" for kind in type(thing).__mro__)


class Given:
    """What a loader (a copy of the user's, which this changes) has given in its latest pass, whoever took it.

    Attributes:
        first: The first two batches that its latest iterator has given, as far as it has. Whoever has compared them
            lets go of them by putting another list here.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.first: list[Any] = []
        self._made: weakref.ref[Any] | None = None
        self._make = getattr(loader, "_get_iterator", None)
        if callable(self._make):
            loader.__dict__["_get_iterator"] = self._noted

    def count(self) -> int | None:
        """How many batches; of an iterator that is gone: all, which is `sys.maxsize`.

        Without `_get_iterator` or `_num_yielded`: None, that is not known.
        """
        if self._made is None:
            return None
        iterator = self._made()
        return sys.maxsize if iterator is None else getattr(iterator, "_num_yielded", None)

    def _noted(self) -> Any:
        assert self._make is not None
        iterator = self._make()
        self._made, self.first = weakref.ref(iterator), []
        read = getattr(type(iterator), "_next_data", None)
        if read is not None:  # without it, `first` stays empty
            iterator.__dict__["_next_data"] = functools.partial(_note, self._made, read, self.first)
        return iterator


def _note(made: weakref.ref[Any], read: Callable[[Any], Any], first: list[Any]) -> Any:
    """An iterator's next batch, noted until there are two: in the place of its method, which it then has again."""
    iterator: Any = made()
    batch = read(iterator)
    first.append(batch)
    if len(first) == 2:
        del iterator.__dict__["_next_data"]
    return batch
