"""Train the head first, and the backbone from a later epoch on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from raytrainer.callbacks.base_finetuning import BaseFinetuning
from raytrainer.errors import ConfigurationError
from raytrainer.plan import argument_checks as checks

if TYPE_CHECKING:
    from raytrainer.module import Module
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["BackboneFinetuning"]

log = logging.getLogger("raytrainer")


def twice(epoch: int) -> float:
    """The default: double the learning rate each epoch."""
    return 2.0


class BackboneFinetuning(BaseFinetuning):
    """Freezes `module.backbone` until an epoch, then trains it with a learning rate of its own, which grows.

    Args:
        unfreeze_backbone_at_epoch: The first epoch (from 0) that trains the backbone.
        lambda_func: Called with the index of the next epoch, as each later one begins; the backbone's learning rate is
            multiplied by what it returns.
        backbone_initial_ratio_lr: The backbone's learning rate begins at that of the first parameter group times this.
        backbone_initial_lr: Or at this.
        should_align: Never let it exceed that of the first parameter group.
        train_bn: Train the backbone's batch normalisation from the beginning.
        verbose: Log the learning rates as each epoch begins.

    Raises:
        ConfigurationError: An argument is out of range; the module has no `backbone`.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = twice,
        backbone_initial_ratio_lr: float = 0.1,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        train_bn: bool = True,
        verbose: bool = False,
    ) -> None:
        super().__init__()
        self.unfreeze_backbone_at_epoch = checks.count(
            "unfreeze_backbone_at_epoch", unfreeze_backbone_at_epoch, least=0
        )
        checks.number("backbone_initial_ratio_lr", backbone_initial_ratio_lr, above=0.0, none=False)
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = checks.number("backbone_initial_lr", backbone_initial_lr, above=0.0)
        self.lambda_func, self.should_align = lambda_func, should_align
        self.train_bn, self.verbose = train_bn, verbose
        self._lr = 0.0  # the backbone's

    def setup(self, trainer: TrainerView, module: Module, stage: str) -> None:
        """Freeze."""
        if not isinstance(getattr(module, "backbone", None), nn.Module):
            raise ConfigurationError(
                f"BackboneFinetuning: {type(module).__name__} has no module `backbone`; name it so, or derive a "
                f"callback from BaseFinetuning."
            )
        super().setup(trainer, module, stage)

    def freeze_before_training(self, module: Module) -> None:
        """Freeze the backbone."""
        self.freeze(module.backbone, train_bn=self.train_bn)  # type: ignore[arg-type]

    def finetune_function(self, module: Module, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze the backbone; later on raise its learning rate."""
        rate = optimizer.param_groups[0]["lr"]
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        if epoch == self.unfreeze_backbone_at_epoch:
            self._lr = self.backbone_initial_lr or rate * self.backbone_initial_ratio_lr
            self.unfreeze_and_add_param_group(module.backbone, optimizer, self._lr)  # type: ignore[arg-type]
        elif len(optimizer.param_groups) > 1:
            raised = self._lr * self.lambda_func(epoch + 1)
            self._lr = min(raised, rate) if self.should_align else raised
            optimizer.param_groups[-1]["lr"] = self._lr
        if self.verbose:
            log.info("Epoch %d: learning rate %.3g, of the backbone %.3g.", epoch, rate, self._lr)

    def state_dict(self) -> dict[str, Any]:
        """The backbone's learning rate, too."""
        return {**super().state_dict(), "lr": self._lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        super().load_state_dict(state_dict)
        self._lr = state_dict["lr"]
