"""`LearningRates`: what a search for a learning rate has seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raytrainer.errors import ConfigurationError
from raytrainer.plan.searches import steepest

__all__ = ["LearningRates"]


@dataclass
class LearningRates:
    """What `Trainer.lr_find` has seen.

    Attributes:
        results: "lr": the learning rates tried; "loss": the loss at each, smoothed; "raw": as it was.
        attribute: The attribute that was set to the suggestion, if any.
    """

    results: dict[str, list[float]] = field(default_factory=dict)
    attribute: str | None = None

    def suggestion(self, skip_begin: int | None = None, skip_end: int = 1) -> float | None:
        """The learning rate at which the loss falls fastest, by the slope over a fifth of the rates around it.

        Args:
            skip_begin: Leave out so many of the first rates; None: a tenth of them, at most 10.
            skip_end: Leave out so many of the last, where the loss may be blowing up.

        Returns:
            None where the loss does not fall, or no rate is left.
        """
        if skip_begin is None:
            skip_begin = min(10, len(self.results["raw"]) // 10)
        index = steepest(self.results["raw"], skip_begin, skip_end)
        return None if index is None else self.results["lr"][index]

    def plot(self, suggest: bool = True, ax: Any = None) -> Any:
        """Loss against learning rate as a matplotlib figure.

        Args:
            suggest: Mark the suggestion.
            ax: Draw here; None: a new figure.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ConfigurationError("plot() needs matplotlib: pip install matplotlib") from error
        if ax is None:
            ax = Figure().add_subplot()
        ax.plot(self.results["lr"], self.results["loss"])
        ax.set_xscale("log")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("smoothed loss")
        rate = self.suggestion() if suggest else None
        if rate is not None:
            ax.plot(rate, self.results["loss"][self.results["lr"].index(rate)], "o")
        return ax.figure
