"""Which checkpoints to keep, and what they are called: pure bookkeeping over paths and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from string import Formatter

from raytrainer.errors import ConfigurationError
from raytrainer.plan.early_stopping_rule import is_better, worst_score

__all__ = [
    "Placement",
    "best_path",
    "check_arguments",
    "comparable",
    "fill_template",
    "free_name",
    "place",
    "template_fields",
    "worst_path",
]


@dataclass(frozen=True)
class Placement:
    """Whether a new checkpoint earns a place, and which kept one has to go for it (None: none)."""

    save: bool
    drop: str | None = None


def place(kept: Mapping[str, float], score: float, top_k: int, mode: str) -> Placement:
    """Decide on a checkpoint with this score.

    Args:
        kept: Scores of the checkpoints that are kept now, by path, oldest first.
        score: The new checkpoint's score; NaN is worse than everything.
        top_k: How many to keep: 0 none, -1 all.
        mode: "min" or "max".
    """
    if top_k == 0:
        return Placement(save=False)
    if top_k < 0 or len(kept) < top_k:
        return Placement(save=True)
    worst = worst_path(kept, mode)
    assert worst is not None
    if is_better(score, comparable(kept[worst], mode), mode):
        return Placement(save=True, drop=worst)
    return Placement(save=False)


def comparable(score: float, mode: str) -> float:
    """The score with NaN made the worst of all."""
    return worst_score(mode) if math.isnan(score) else score


def best_path(kept: Mapping[str, float], mode: str) -> str | None:
    """The path with the best score, the oldest of equals; None when nothing is kept."""
    pick = min if mode == "min" else max
    return pick(kept, key=lambda path: comparable(kept[path], mode), default=None)


def worst_path(kept: Mapping[str, float], mode: str) -> str | None:
    """The path with the worst score, the oldest of equals; None when nothing is kept."""
    pick = max if mode == "min" else min
    return pick(kept, key=lambda path: comparable(kept[path], mode), default=None)


def template_fields(template: str) -> list[str]:
    """The names between braces, in order. Raises ValueError for a template that cannot be read."""
    names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    if "" in names:
        raise ValueError("a pair of braces without a name")
    return names


def fill_template(template: str, values: Mapping[str, float], auto_insert_metric_name: bool = True) -> str:
    """Fill "{epoch}-{val/loss:.2f}" to "epoch=3-val_loss=0.31"; names that `values` lacks count as 0.

    Without `auto_insert_metric_name` only the values are put in: "3-0.31". A slash in an inserted name becomes an
    underscore, so that it makes no folder.
    """
    parts: list[str] = []
    for literal, name, spec, _ in Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        value = values.get(name, 0)
        spec = spec or ""
        whole = isinstance(value, int) or (spec.endswith("d") and math.isfinite(value))
        text = format(int(value) if whole else value, spec)
        inserted = name.replace("/", "_") + "=" if auto_insert_metric_name else ""
        parts.append(inserted + text)
    return "".join(parts)


def free_name(stem: str, suffix: str, taken: Callable[[str], bool]) -> str:
    """`stem + suffix`, or the first of `stem-v1`, `stem-v2`, ... that is not taken."""
    candidate, version = stem + suffix, 1
    while taken(candidate):
        candidate, version = f"{stem}-v{version}{suffix}", version + 1
    return candidate


def check_arguments(
    filename: str | None,
    monitor: str | None,
    mode: str,
    save_top_k: int,
    every_n_epochs: int | None,
    every_n_train_steps: int | None,
    train_time_interval: timedelta | None = None,
) -> None:
    """Raise ConfigurationError for arguments of `ModelCheckpoint` that are out of range or contradict each other."""
    if mode not in ("min", "max"):
        raise ConfigurationError(f"ModelCheckpoint(mode={mode!r}): allowed are 'min' and 'max'")
    if not isinstance(save_top_k, int) or save_top_k < -1:
        raise ConfigurationError(
            f"ModelCheckpoint(save_top_k={save_top_k!r}): allowed are -1 (all), 0 (none), 1, 2, ..."
        )
    if monitor is None and save_top_k > 1:
        raise ConfigurationError(
            f"ModelCheckpoint(save_top_k={save_top_k}, monitor=None): without a metric there is no best; "
            "name one with monitor=, or use save_top_k=1 (the latest) or -1 (all)"
        )
    for name, value in (("every_n_epochs", every_n_epochs), ("every_n_train_steps", every_n_train_steps)):
        if value is not None and value < 0:
            raise ConfigurationError(f"ModelCheckpoint({name}={value}): must be 1 or more; 0 turns it off")
    if every_n_epochs and every_n_train_steps:
        raise ConfigurationError(
            f"ModelCheckpoint(every_n_epochs={every_n_epochs}, every_n_train_steps={every_n_train_steps}): allowed is "
            "one of them; use two ModelCheckpoints for both"
        )
    if train_time_interval is not None:
        if not isinstance(train_time_interval, timedelta) or train_time_interval <= timedelta(0):
            raise ConfigurationError(
                f"ModelCheckpoint(train_time_interval={train_time_interval!r}): must be a datetime.timedelta above zero"
            )
        if every_n_epochs or every_n_train_steps:
            raise ConfigurationError(
                f"ModelCheckpoint(train_time_interval=..., every_n_epochs={every_n_epochs}, "
                f"every_n_train_steps={every_n_train_steps}): allowed is one of them; use several ModelCheckpoints"
            )
    try:
        template_fields(filename or "")
        fill_template(filename or "", {})
    except ValueError as error:
        raise ConfigurationError(
            f"ModelCheckpoint(filename={filename!r}): {error}; write names in braces: '{{epoch}}-{{val_loss:.2f}}'"
        ) from error
