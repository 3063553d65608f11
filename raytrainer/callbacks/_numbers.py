"""Metrics as text, short enough for a progress bar."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["format_metrics", "format_value"]


def format_value(value: Any) -> str:
    """Three decimals; very small and very large numbers with an exponent. Text, and whole numbers, as they are."""
    if isinstance(value, (int, str)):
        return str(value)
    value = float(value)
    if value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e6:
        return f"{value:.3f}"
    return f"{value:.2e}"


def format_metrics(metrics: Mapping[str, Any], equals: str = " ", gap: str = "  ") -> str:
    """ "loss 0.123  val_acc 0.980"."""
    return gap.join(f"{name}{equals}{format_value(value)}" for name, value in metrics.items())
