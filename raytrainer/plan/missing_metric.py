"""What is said where a metric that somebody waits for has not been logged."""

from __future__ import annotations

from collections.abc import Iterable

from raytrainer.plan.nearest_names import perhaps

__all__ = ["missing_metric"]


def missing_metric(wanted: str, known: Iterable[str], validated: bool) -> str:
    """A sentence or more, to follow the name of whoever monitors it.

    Args:
        wanted: The metric.
        known: What has been logged.
        validated: Whether there is a validation, which might have logged it.
    """
    names = sorted(known)
    text = f"no such metric was logged; there are: {', '.join(names) or 'none'}.{perhaps(wanted, names)}"
    if not validated:
        text += (
            " Nothing is validated (there is no validation loader, or no validation_step, or limit_val_batches=0), so "
            "what validation_step logs is not among them."
        )
    return f"{text} Call self.log({wanted!r}, ...) in the module, or monitor one that is there"
