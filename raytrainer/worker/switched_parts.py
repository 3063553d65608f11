"""What a run's hooks have switched: which parameters train, which modules are in training mode, who optimizes what.

No state dict has it, and hooks that have been called are not called again where a run goes on from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from raytrainer.view.added_groups import cover_groups
from raytrainer.view.scheduler_config import SchedulerConfig

__all__ = ["SwitchedParts"]


class SwitchedParts:
    """Compares a module with what it was like when the run was set up, `configure_optimizers` included.

    What has not changed since then is not kept: a run that goes on may begin otherwise than the one before on purpose.

    Args:
        module: As it is set up, before the hooks of training.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.note([])

    def note(self, optimizers: Sequence[Optimizer]) -> None:
        """What there is now, when `configure_optimizers`, which may have frozen parts too, has made these."""
        module = self._module
        self._trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        self._modes = {name: part.training for name, part in module.named_modules()}
        self._groups = [len(optimizer.param_groups) for optimizer in optimizers]

    def changes(self, optimizers: Sequence[Optimizer], modes: Mapping[nn.Module, bool]) -> dict[str, Any]:
        """What has changed, as plain values; empty if nothing has.

        Args:
            optimizers: The run's.
            modes: Of each module outside of the evaluation in progress; empty if there is none.
        """
        trained, training = self.flags(modes)
        added = [
            [self._names(group["params"]) for group in optimizer.param_groups[made:]]
            for optimizer, made in zip(optimizers, self._groups, strict=False)
        ]
        changes = {
            "trained": {n: flag for n, flag in trained.items() if self._trained.get(n, flag) != flag},
            "modes": {n: flag for n, flag in training.items() if self._modes.get(n, flag) != flag},
            "groups": added if any(added) else [],
        }
        return changes if any(changes.values()) else {}

    def _names(self, parameters: Sequence[Tensor]) -> list[str]:
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        return [names[id(p)] for p in parameters if id(p) in names]

    def flags(self, modes: Mapping[nn.Module, bool]) -> tuple[dict[str, bool], dict[str, bool]]:
        """What is trained, and in training mode, outside of the evaluation in progress (see `changes`), by name."""
        module = self._module
        toggled = module.__dict__.get("_toggled", {})  # by toggle_optimizer, for a while
        trained = {name: toggled.get(p, p.requires_grad) for name, p in module.named_parameters()}
        return trained, {name: modes.get(part, part.training) for name, part in module.named_modules()}

    def put_back(self, trained: Mapping[str, bool], training: Mapping[str, bool]) -> None:
        """The reverse of `flags`."""
        named, parts = dict(self._module.named_parameters()), dict(self._module.named_modules())
        for name, flag in trained.items():
            if name in named:
                named[name].requires_grad = flag
        for name, flag in training.items():
            if name in parts:
                parts[name].training = flag

    def take_up(
        self, changes: Mapping[str, Any], optimizers: Sequence[Optimizer], configs: Sequence[SchedulerConfig]
    ) -> None:
        """Change the module, and the optimizers before they load their states, as `changes` says."""
        if not changes:
            return
        self.put_back(changes["trained"], changes["modes"])
        named = dict(self._module.named_parameters())
        for optimizer, made, groups in zip(optimizers, self._groups, changes["groups"], strict=False):
            for names in groups[len(optimizer.param_groups) - made :]:
                optimizer.add_param_group({"params": [named[name] for name in names if name in named]})
        if changes["groups"]:
            cover_groups(configs)
