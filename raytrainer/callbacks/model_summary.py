"""Print what a module consists of, before it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import UninitializedParameter

from raytrainer.callbacks.callback import Callback
from raytrainer.cells import html_table, in_notebook, show_html
from raytrainer.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from raytrainer.callbacks.running_trainer import RunningTrainer
    from raytrainer.module import Module

__all__ = ["ModelSummary", "ModuleRow", "ModuleTotals", "plain_text", "show_rich", "summarize", "total"]


@dataclass(frozen=True)
class ModuleRow:
    """One submodule.

    Attributes:
        name: Its path, such as "encoder.0".
        type: Its class.
        params: Its parameters' elements, shared ones counted once; lazy ones, whose size is unknown, not at all.
        mode: "train" or "eval".
        lazy: Whether it has parameters of unknown size.
    """

    name: str
    type: str
    params: int
    mode: str
    lazy: bool = False


@dataclass(frozen=True)
class ModuleTotals:
    """Elements of all parameters, shared ones counted once, and their size in MB (10^6 bytes) in their own types."""

    trainable: int
    frozen: int
    megabytes: float
    lazy: bool

    @property
    def params(self) -> int:
        return self.trainable + self.frozen


class ModelSummary(Callback):
    """Prints a table of submodules and the number of parameters when `fit` starts.

    Args:
        max_depth: How many levels of submodules to list [1]: 0 for the totals only, -1 for all.

    Raises:
        ConfigurationError: `max_depth` is below -1.
    """

    def __init__(self, max_depth: int = 1) -> None:
        _check_depth(max_depth)
        self.max_depth = max_depth

    def on_fit_start(self, trainer: RunningTrainer, module: Module) -> None:
        """Print it."""
        from rich.console import Console  # not in workers, which import this module too

        self.show(Console(), summarize(module, self.max_depth), total(module))

    def show(self, console: Console, rows: Sequence[ModuleRow], totals: ModuleTotals) -> None:
        """Print it as a table for terminals, or elsewhere in plain columns."""
        from raytrainer.callbacks._progress_display import is_live

        if in_notebook():
            cells = [("", "Name", "Type", "Params", "Mode"), *(_cells(number, row) for number, row in enumerate(rows))]
            show_html(html_table(cells, total_lines(totals), numbers=[3]), plain_text(rows, totals))
        elif is_live(console):
            show_rich(console, rows, totals)
        else:
            print(plain_text(rows, totals), flush=True)


def summarize(module: nn.Module, max_depth: int = 1) -> list[ModuleRow]:
    """A row for every submodule down to `max_depth` levels (0: none, -1: all), in the order of definition.

    Raises:
        ConfigurationError: `max_depth` is below -1.
    """
    _check_depth(max_depth)
    rows = []
    for name, child in module.named_modules():
        depth = name.count(".") + 1
        if name and (max_depth == -1 or depth <= max_depth):
            count, lazy = _count(child.parameters())
            rows.append(ModuleRow(name, type(child).__name__, count, "train" if child.training else "eval", lazy))
    return rows


def total(module: nn.Module) -> ModuleTotals:
    """What all parameters come to, those of the module itself included."""
    parameters = list(module.parameters())
    trainable, _ = _count(parameter for parameter in parameters if parameter.requires_grad)
    every, lazy = _count(parameters)
    size = sum(p.numel() * p.element_size() for p in parameters if not isinstance(p, UninitializedParameter))
    return ModuleTotals(trainable, every - trainable, size / 1e6, lazy)


def plain_text(rows: Sequence[ModuleRow], totals: ModuleTotals) -> str:
    """The table in plain columns, and the totals below it."""
    lines = list(total_lines(totals))
    if not rows:
        return "\n".join(lines)
    cells = [("", "Name", "Type", "Params", "Mode")]
    cells += [_cells(number, row) for number, row in enumerate(rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    table = []
    for line in cells:
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        padded[3] = line[3].rjust(widths[3])
        table.append("  ".join(padded).rstrip())
    rule = "-" * max(map(len, table))
    return "\n".join([table[0], rule, *table[1:], rule, *lines])


def show_rich(console: Console, rows: Sequence[ModuleRow], totals: ModuleTotals) -> None:
    """Print the table for a terminal, and the totals below it."""
    if rows:
        console.print(rich_table(rows))
    console.print("\n".join(total_lines(totals)), highlight=False)


def rich_table(rows: Sequence[ModuleRow]) -> Table:
    """The table for a terminal."""
    from rich.table import Table

    table = Table(header_style="bold")
    for title in ("", "Name", "Type"):
        table.add_column(title)
    table.add_column("Params", justify="right")
    table.add_column("Mode")
    for number, row in enumerate(rows):
        table.add_row(*_cells(number, row))
    return table


def _cells(number: int, row: ModuleRow) -> tuple[str, str, str, str, str]:
    return str(number), row.name, row.type, _params(row.params, row.lazy), row.mode


def total_lines(totals: ModuleTotals) -> Iterable[str]:
    """The totals as lines of text."""
    yield f"{_params(totals.trainable, False)} trainable, {_params(totals.frozen, False)} non-trainable parameters"
    size = f"{totals.megabytes:.3f}" if totals.megabytes < 1 else f"{totals.megabytes:,.1f}"
    yield f"{_params(totals.params, False)} parameters in total, {size} MB"
    if totals.lazy:
        yield "Lazy parameters, whose size is not known before the first batch, are not counted."


def _count(parameters: Iterable[nn.Parameter]) -> tuple[int, bool]:
    count, lazy = 0, False
    for parameter in parameters:
        if isinstance(parameter, UninitializedParameter):
            lazy = True
        else:
            count += parameter.numel()
    return count, lazy


def _params(count: int, lazy: bool) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}" + (" + lazy" if lazy else "")
    return "lazy" if lazy and count == 0 else f"{count}" + (" + lazy" if lazy else "")


def _check_depth(max_depth: int) -> None:
    if max_depth < -1:
        raise ConfigurationError(f"max_depth={max_depth}: allowed are -1 (all levels), 0 (totals only), 1, 2, ...")
