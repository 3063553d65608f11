"""Hooks that are never called, those that Lightning had once and misspelt ones: what they do would be lost unsaid."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from types import FunctionType
from typing import Any

from raytrainer.callbacks import Callback, WorkerCallback
from raytrainer.datamodule import DataModule
from raytrainer.errors import ConfigurationError
from raytrainer.module import Module
from raytrainer.plan.nearest_names import nearly

__all__ = ["own_functions", "refuse_former_hooks"]

log = logging.getLogger("raytrainer")

#: What takes the place of a hook that was given the outputs of all steps.
_WITH_OUTPUTS = {
    "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "on_validation_epoch_end",
    "test_epoch_end": "on_test_epoch_end",
}
#: What hooks are called.
_HOOK = re.compile(r"^on_|_step$|_dataloader$|^configure_|^transfer_|^setup$|^teardown$|^prepare_data$")

#: Attributes of a module that say how it is trained.
_FLAGS = ("automatic_optimization", "strict_loading")

#: Of modules and callbacks.
_RENAMED = {
    "on_epoch_start": "on_train_epoch_start and on_validation_epoch_start",
    "on_epoch_end": "on_train_epoch_end and on_validation_epoch_end",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_pretrain_routine_start": "on_fit_start",
    "on_pretrain_routine_end": "on_fit_start",
    "on_configure_sharded_model": "setup",
    "configure_sharded_model": "configure_model",
    "on_init_start": "setup",
    "on_init_end": "setup",
    "on_keyboard_interrupt": "on_exception",
    "tbptt_split_batch": "a dataset whose samples are cut already",
    "get_progress_bar_dict": "self.log(..., prog_bar=True)",
    "on_hpc_save": "on_save_checkpoint",
    "on_hpc_load": "on_load_checkpoint",
    "on_before_accelerator_backend_setup": "setup",
    "on_post_move_to_device": "on_fit_start",
    **{f"on_{stage}_dataloader": f"{stage}_dataloader" for stage in ("train", "val", "test", "predict")},
    **{f"on_reset_{stage}_dataloader": f"{stage}_dataloader" for stage in ("train", "val", "test", "predict")},
}

#: What has hooks, and what a user derives it from.
_BASES = (Module, DataModule, Callback, WorkerCallback)


def refuse_former_hooks(
    module: Module, datamodule: DataModule | None, callbacks: Iterable[Callback | WorkerCallback]
) -> None:
    """Refuse those that were given outputs, as Lightning does, and warn of others, which might be the user's own.

    Raises:
        ConfigurationError: The module has one.
    """
    for name, instead in _WITH_OUTPUTS.items():
        if callable(getattr(module, name, None)):
            raise ConfigurationError(
                f"{type(module).__name__}.{name} is never called: it is {instead}(self) now, without outputs. Keep "
                f"what it needs in an attribute during the steps, as in self.outputs.append(...)."
            )
    _warn_of_misspelt_flags(module)
    for owner in (module, *callbacks, *filter(None, [datamodule])):
        base = next(base for base in _BASES if isinstance(owner, base))
        _warn_of_misspelt(owner, base)
        _warn_of_misplaced(owner, base)
        for name, instead in _RENAMED.items():
            if callable(getattr(owner, name, None)):
                log.warning("%s.%s is not called by the Trainer; there is %s.", type(owner).__name__, name, instead)


def _warn_of_misspelt_flags(module: Module) -> None:
    kinds = (kind for kind in type(module).__mro__ if not issubclass(Module, kind))
    for name in dict.fromkeys((*vars(module), *(name for kind in kinds for name in vars(kind)))):
        if name not in _FLAGS and (meant := nearly(name, _FLAGS)):
            log.warning("%s.%s means nothing to the Trainer: did you mean %s?", type(module).__name__, name, meant)


def own_functions(owner: Any, base: type) -> list[str]:
    """Methods that the user's classes have and `base` has not."""
    kinds = (kind for kind in type(owner).__mro__ if not issubclass(base, kind))
    found = (name for kind in kinds for name, value in vars(kind).items() if isinstance(value, FunctionType))
    return [name for name in dict.fromkeys(found) if not hasattr(base, name)]


def _warn_of_misspelt(owner: Any, base: type) -> None:
    """One letter or two from a hook that the class does not have: most likely that is meant."""
    missing = [
        hook for hook in dir(base) if _HOOK.search(hook) and getattr(type(owner), hook) is getattr(base, hook, None)
    ]
    for name in own_functions(owner, base):
        if hook := nearly(name, missing, cutoff=0.92):
            log.warning("%s.%s is not called by the Trainer: did you mean %s?", type(owner).__name__, name, hook)


def _warn_of_misplaced(owner: Any, base: type) -> None:
    """A hook of another class, such as a DataModule's `on_train_epoch_end`: its own name is right, its place is not."""
    if sum(isinstance(owner, kind) for kind in _BASES) > 1:  # it may be given as the other one, too
        return
    for name in own_functions(owner, base):
        homes = [kind.__name__ for kind in _BASES if hasattr(kind, name)]
        if homes and _HOOK.search(name):
            log.warning(
                "%s.%s is not called by the Trainer: it is a hook of %s, not of a %s.",
                type(owner).__name__, name, " and ".join(homes), base.__name__,
            )  # fmt: skip
