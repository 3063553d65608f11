"""End training when its loss jumps."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.errors import ConfigurationError, TrainingSpikeError
from raytrainer.plan import argument_checks as checks
from raytrainer.replaced_file import replaced

if TYPE_CHECKING:
    from raytrainer.module import Module
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["SpikeDetection"]


class SpikeDetection(WorkerCallback):
    """Ends the run with a `TrainingSpikeError` when a batch's loss is far from the mean of those before it.

    A spike is a loss that is no better than the one before it, and away from the mean of the last `window` losses by
    at least `atol` and by at least `rtol` times that mean. Which batches to leave out another time, that one and the
    one before, is written to a file, a JSON list of batch indices of the epoch. Each worker looks at its own loss; a
    spike in one of them ends the run. Reading the loss waits for the device in every batch.

    Args:
        mode: "min" if lower is better, or "max".
        window: Of how many losses the mean is.
        warmup: The first batches of each epoch that are not looked at.
        atol: See above; None: any distance.
        rtol: Likewise.
        exclude_batches_path: The file, or a folder for a `skip_batches.json`, on the machine of the worker that sees
            the spike. None: in the Trainer's `default_root_dir`.
        finite_only: Whether any loss that is NaN or infinite is a spike. False: NaN is none, infinity one if it is
            worse; neither is part of a mean.

    Attributes:
        bad_batches: What is in the file.

    Raises:
        ConfigurationError: Arguments out of range; manual optimization whose `training_step` does not return the loss.
        TrainingSpikeError: There was a spike.
    """

    def __init__(
        self,
        mode: str = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: str | os.PathLike[str] | None = None,
        finite_only: bool = True,
    ) -> None:
        self.mode = checks.choice("SpikeDetection(mode)", mode, ("min", "max"))
        self.window = checks.count("SpikeDetection(window)", window, least=1)
        self.warmup = checks.count("SpikeDetection(warmup)", warmup, least=0)
        self.atol = checks.number("SpikeDetection(atol)", atol, above=0, zero=True)
        self.rtol = checks.number("SpikeDetection(rtol)", rtol, above=0, zero=True)
        self.finite_only = checks.boolean("SpikeDetection(finite_only)", finite_only)
        self.exclude_batches_path = exclude_batches_path
        self.bad_batches: list[int] = []
        self._losses: deque[float] = deque(maxlen=self.window)

    def on_train_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the batch's loss."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:
            if module.automatic_optimization:
                return  # the batch was left out
            raise ConfigurationError(
                "SpikeDetection sees no loss: with manual optimization, return it from training_step."
            )
        value = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
        if batch_idx >= self.warmup and self._is_spike(value):
            mean = sum(self._losses) / max(len(self._losses), 1)
            self.bad_batches += [batch_idx - 1, batch_idx] if batch_idx else [batch_idx]
            path = self._path(trainer)
            try:
                self._write(path)
                where = f"are in {path}"
            except OSError as error:  # the spike is what is to be told
                where = f"are {self.bad_batches}, which could not be written to {path}: {error}"
            raise TrainingSpikeError(
                f"Training spike in batch {batch_idx} of epoch {trainer.current_epoch}: the loss is {value:g}, where "
                f"the mean of the last {len(self._losses)} was {mean:g}. Batches to leave out {where}.",
                batch_idx,
            )
        if math.isfinite(value):
            self._losses.append(value)

    def state_dict(self) -> dict[str, Any]:
        """The last losses, and the batches to leave out."""
        return {"losses": list(self._losses), "bad_batches": list(self.bad_batches)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._losses = deque(state_dict["losses"], maxlen=self.window)
        self.bad_batches = list(state_dict["bad_batches"])

    def _is_spike(self, loss: float) -> bool:
        if self.finite_only and not math.isfinite(loss):
            return True
        if not self._losses:
            return False
        change = loss - self._losses[-1]
        if change <= 0 if self.mode == "min" else change >= 0:
            return False
        mean = sum(self._losses) / len(self._losses)
        distance = abs(loss - mean)
        return distance >= (self.atol or 0.0) and distance >= (self.rtol or 0.0) * abs(mean)

    def _path(self, trainer: TrainerView) -> Path:
        path = Path(self.exclude_batches_path or trainer.default_root_dir)
        return path if path.suffix == ".json" else path / "skip_batches.json"

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as file:  # several workers may write it
            json.dump(self.bad_batches, file)
