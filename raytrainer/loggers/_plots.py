"""Metrics over steps as a matplotlib figure: what belongs together shares an axis."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from raytrainer.cells import cell_number, in_notebook, show_png
from raytrainer.errors import ConfigurationError
from raytrainer.extras import not_installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["group_names", "plot_rows", "split_runs"]

#: Values of one metric: (step, value), in the order in which they were logged.
Points = list[tuple[int, float]]

_STAGES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
}  # fmt: skip
_COLOURS = {"train": "#3b6fb6", "val": "#e07b39", "test": "#3a9a5b"}
_OTHERS = ("#3b6fb6", "#e07b39", "#3a9a5b", "#9467bd", "#c94f5d", "#8c6d57", "#5aa9b8", "#7f7f7f")
_FEW = 40  # points up to which each gets a mark


def group_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that belong on one axis, by the axis' title.

    Those that differ only in the stage ("train_loss", "val_loss", "loss/test"), in "_step" and "_epoch", in "min" and
    "max", or in a number ("gpu_memory/node0-gpu1") belong together.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_title(name), []).append(name)
    return groups


def _title(name: str) -> str:
    base = re.sub(r"/dataloader_idx_\d+$", "", name)
    base = re.sub(r"_(step|epoch)$", "", base)
    base = re.sub(rf"^({'|'.join(_STAGES)})[_/.\-]", "", base)
    base = re.sub(rf"[_/.\-]({'|'.join(_STAGES)})$", "", base)
    base = re.sub(r"[_/.\-](min|max)$", "", base)
    return re.sub(r"\d+", "#", base)


def _stage(name: str) -> str | None:
    words = re.split(r"[_/.\-]", name)
    return next((_STAGES[word] for word in words if word in _STAGES), None)


def split_runs(points: Points) -> list[Points]:
    """The runs that follow each other in one log: each begins where the step goes back."""
    runs: list[Points] = []
    for step, value in points:
        if not runs or step < runs[-1][-1][0]:
            runs.append([])
        runs[-1].append((step, value))
    return runs


def plot_rows(series: dict[str, Points], names: str | Sequence[str] | None, source: str) -> Figure:
    """One axis for each group of metrics.

    Args:
        series: Points of every metric, by name.
        names: What to plot, by full name or by the title of an axis; None: everything.
        source: Where the metrics come from, for errors.

    Raises:
        ConfigurationError: matplotlib is not installed, nothing was logged, or a name is unknown.
    """
    figure_type = _figure_type()
    groups = group_names(_chosen(series, names, source))
    columns = 2 if len(groups) == 4 else min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure: Figure = figure_type(figsize=(4.6 * columns + 0.4, 3.1 * rows), layout=_layout())
    first: Axes | None = None
    for index, (title, members) in enumerate(groups.items()):
        axes = figure.add_subplot(rows, columns, index + 1, sharex=first)
        first = first or axes
        in_order = sorted(members, key=lambda name: list(_COLOURS).index(_stage(name) or "train"))
        _plot_group(axes, title, {name: series[name] for name in in_order})
        if index + columns >= len(groups):
            axes.set_xlabel("step")
    if in_notebook():
        figure._ipython_display_()  # type: ignore[attr-defined]
    return figure


def _chosen(series: dict[str, Points], names: str | Sequence[str] | None, source: str) -> list[str]:
    if not series:
        raise ConfigurationError(f"plot: nothing has been logged in {source} yet; fit first, and call self.log(...).")
    if names is None:
        return list(series)
    chosen: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        found = [other for other in series if name in (other, _title(other))]
        if not found:
            raise ConfigurationError(f"plot(names={names!r}): no {name!r} in {source}; there are: {', '.join(series)}.")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def _plot_group(axes: Axes, title: str, members: dict[str, Points]) -> None:
    from matplotlib.ticker import MaxNLocator

    stages = [_stage(name) for name in members]
    by_stage = None not in stages and len(set(stages)) == len(members)
    for index, (name, points) in enumerate(members.items()):
        colour = _COLOURS[stages[index] or ""] if by_stage else _OTHERS[index % len(_OTHERS)]
        runs = split_runs(points)
        for run in runs:
            last = run is runs[-1]
            axes.plot(
                [step for step, _ in run],
                [value for _, value in run],
                color=colour,
                alpha=1.0 if last else 0.3,
                linewidth=1.6 if len(run) <= _FEW else 1.1,
                marker="o" if len(run) <= _FEW else None,
                markersize=3.5,
                label=name if last else None,
            )
    axes.set_title(next(iter(members)) if len(members) == 1 else title, fontsize=11)
    axes.grid(color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9a9a9a")
    axes.tick_params(color="#9a9a9a", labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if len(members) > 1:
        axes.legend(frameon=False, fontsize=9)


def _layout() -> Any:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return ConstrainedLayoutEngine(h_pad=0.08)


def _figure_type() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise not_installed("plot", "matplotlib", "plot") from error

    class MetricFigure(Figure):
        """A figure that pyplot does not know, so that nothing needs closing. A cell shows it once.

        The cell that draws it shows it at once, so that `trainer.plot();` does too, and so does one in a loop.
        """

        shown_in: int | None = None  # number of the cell that has

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            FigureCanvasAgg(self).print_png(buffer)
            return buffer.getvalue()

        def _ipython_display_(self) -> None:
            if self.shown_in is None or self.shown_in != cell_number():
                self.shown_in = cell_number()
                show_png(self._repr_png_(), repr(self))

    return MetricFigure
