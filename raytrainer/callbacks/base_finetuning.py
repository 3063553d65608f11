"""Train parts of a module from a later epoch on."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.private.torch_private import BATCH_NORMS
from raytrainer.view.added_groups import cover_groups

if TYPE_CHECKING:
    from raytrainer.module import Module
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["BaseFinetuning"]

log = logging.getLogger("raytrainer")

Modules: TypeAlias = "nn.Module | Iterable[Modules]"  # lists of lists, too


class BaseFinetuning(WorkerCallback):
    """Freezes what `freeze_before_training` says, and calls `finetune_function` as every epoch begins.

    Override both; use `freeze` in the first and `unfreeze_and_add_param_group` in the second. `configure_optimizers`
    should leave frozen parameters out: `[p for p in self.parameters() if p.requires_grad]`. What is frozen and which
    parameter groups were added is part of checkpoints. Schedulers drive an added group along with the first one: its
    learning rate rises and falls with that one's, as far above or below it as it began.
    """

    def __init__(self) -> None:
        self._epoch = -1  # the latest that has begun

    @abstractmethod
    def freeze_before_training(self, module: Module) -> None:
        """Freeze what shall not train yet; before `configure_optimizers`."""

    @abstractmethod
    def finetune_function(self, module: Module, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze what shall train from `epoch` (from 0) on; called once an epoch for each optimizer."""

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Let parameters require no gradient.

        Args:
            modules: A module or several, with all that is in them.
            train_bn: Leave batch normalisation as it is; otherwise its running statistics stay as they are, too.
        """
        for module in _flatten(modules):
            if isinstance(module, BATCH_NORMS):
                if train_bn:
                    continue
                module.track_running_stats = False
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = False

    @staticmethod
    def unfreeze(modules: Modules, train_bn: bool = True) -> None:
        """Undo `freeze`; without `train_bn`, batch normalisation stays as it is."""
        for module in _flatten(modules):
            if isinstance(module, BATCH_NORMS):
                if not train_bn:
                    continue
                module.track_running_stats = True
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = True

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """`unfreeze`, batch normalisation too."""
        BaseFinetuning.unfreeze(modules)

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """Those of the modules and of all that is in them that have parameters of their own, or nothing in them."""
        return [m for m in _flatten(modules) if m._parameters or not any(m.children())]

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Unfreeze, and have the optimizer train what it does not train yet, as a parameter group of its own.

        Args:
            modules: A module or several.
            optimizer: The optimizer.
            lr: The group's learning rate; None: that of the first group divided by `initial_denom_lr`.
            initial_denom_lr: See `lr`.
            train_bn: Whether to unfreeze batch normalisation too, and add its parameters.
        """
        parts = list(_flatten(modules))
        BaseFinetuning.unfreeze(parts, train_bn)
        known = {p for group in optimizer.param_groups for p in group["params"]}
        taken = [m for m in parts if train_bn or not isinstance(m, BATCH_NORMS)]
        found = dict.fromkeys(p for m in taken for p in m.parameters(recurse=False) if p.requires_grad)
        added = [p for p in found if p not in known]
        if not added:
            log.warning(
                "The optimizer trains all of that already, so no parameter group is added; in configure_optimizers, "
                "give it [p for p in self.parameters() if p.requires_grad]."
            )
            return
        rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else lr
        optimizer.add_param_group({"params": added, "lr": rate})

    def setup(self, trainer: TrainerView, module: Module, stage: str) -> None:
        """Freeze."""
        if stage == "fit":
            self._epoch = -1
            self.freeze_before_training(module)

    def on_train_epoch_start(self, trainer: TrainerView, module: Module) -> None:
        """Unfreeze; once an epoch, also one that is resumed."""
        if trainer.current_epoch > self._epoch:
            self._epoch = trainer.current_epoch
            for optimizer in trainer.optimizers:
                self.finetune_function(module, trainer.current_epoch, optimizer)
            cover_groups(trainer.lr_scheduler_configs)

    def on_save_checkpoint(self, trainer: TrainerView, module: Module, checkpoint: dict[str, Any]) -> None:
        """Note which batch normalisations track statistics; what trains, in which groups, a checkpoint has anyway."""
        if "worker_callbacks" in checkpoint:
            tracked = [name for name, norm in _norms(module) if norm.track_running_stats]
            checkpoint["finetuning"] = {"tracked": tracked}

    def on_load_checkpoint(self, trainer: TrainerView, module: Module, checkpoint: dict[str, Any]) -> None:
        """Have the same ones track them."""
        saved = checkpoint.get("finetuning")
        if saved is not None:
            for name, norm in _norms(module):
                norm.track_running_stats = name in saved["tracked"]

    def state_dict(self) -> dict[str, Any]:
        """The latest epoch that has begun."""
        return {"epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._epoch = state_dict["epoch"]


def _flatten(modules: Modules) -> Iterator[nn.Module]:
    """The modules and all that is in them, each once."""
    yield from dict.fromkeys(inner for module in _given(modules) for inner in module.modules())


def _given(modules: Modules) -> Iterator[nn.Module]:
    if isinstance(modules, nn.Module):
        yield modules
    else:
        for part in modules:
            yield from _given(part)


def _norms(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, BATCH_NORMS)]
