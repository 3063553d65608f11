"""Validate, save and end with an exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from raytrainer.callbacks._averaging import Many
from raytrainer.callbacks.weight_averaging import WeightAveraging
from raytrainer.errors import ConfigurationError
from raytrainer.plan import argument_checks as checks

__all__ = ["EMAWeightAveraging"]


class EMAWeightAveraging(WeightAveraging):
    """Keeps an exponential moving average of the weights: average = decay * average + (1 - decay) * weights.

    See `WeightAveraging` for where the averages are used.

    Args:
        decay: In [0, 1]; nearer to 1 averages over more steps.
        update_every_n_steps: Update after so many optimizer steps, after as many again, and so on.
        update_starting_at_step: No update before so many steps are done.
        use_buffers: As of `WeightAveraging`.
        update_starting_at_epoch: Also update as this epoch (from 0) and each later one ends.
        device: As of `WeightAveraging`.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int = 0,
        use_buffers: bool = True,
        update_starting_at_epoch: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ConfigurationError(f"EMAWeightAveraging(decay={decay!r}): give a number in [0, 1].")
        self.decay = decay
        self.update_every_n_steps = checks.count("update_every_n_steps", update_every_n_steps, least=1)
        self.update_starting_at_step = checks.count("update_starting_at_step", update_starting_at_step, least=0)
        self.update_starting_at_epoch = update_starting_at_epoch
        if update_starting_at_epoch is not None:
            checks.count("update_starting_at_epoch", update_starting_at_epoch, least=0)
        super().__init__(use_buffers, device=device)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """As the arguments say."""
        if step_idx is not None:
            done = step_idx + 1
            return bool(done >= self.update_starting_at_step and done % self.update_every_n_steps == 0)
        begin = self.update_starting_at_epoch
        return begin is not None and epoch_idx is not None and epoch_idx >= begin

    def _averaging(self) -> Many:
        average: Many = get_ema_multi_avg_fn(self.decay)
        return average
