"""The summary of a module as a table with borders, everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raytrainer.callbacks.model_summary import ModelSummary, ModuleRow, ModuleTotals, show_rich

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["RichModelSummary"]


class RichModelSummary(ModelSummary):
    """As `ModelSummary`, in whose place it is put, with rich's table also where stdout is no terminal (a log file).

    Args:
        max_depth: How many levels of submodules to list [1]: 0 for the totals only, -1 for all.

    Raises:
        ConfigurationError: `max_depth` is below -1.
    """

    def show(self, console: Console, rows: Sequence[ModuleRow], totals: ModuleTotals) -> None:
        """Print rich's table."""
        show_rich(console, rows, totals)
