"""Shared by the benchmarks: both sides interleaved in one run, medians, ratios."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping

__all__ = ["interleaved", "table"]


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every side once a round, in an order that rotates; returns each side's figures.

    A side returns its own figure (for example seconds a step), so that set-up is not measured.
    """
    figures: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            figures[name].append(sides[name]())
    return figures


def table(figures: Mapping[str, list[float]], base: str, unit: str, scale: float = 1.0) -> str:
    """A Markdown table: median of each side, and the median over rounds of its ratio to `base`."""
    lines = [f"| | median {unit} | ratio to {base} |", "|---|---|---|"]
    for name, values in figures.items():
        ratios = [value / reference for value, reference in zip(values, figures[base], strict=True)]
        lines.append(f"| {name} | {statistics.median(values) * scale:.1f} | {statistics.median(ratios):.2f} |")
    return "\n".join(lines)
