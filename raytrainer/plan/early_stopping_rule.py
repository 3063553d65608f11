"""When a monitored value says that training should end: a pure decision, taken once per check."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["StopReason", "StoppingRules", "StoppingState", "Verdict", "is_better", "judge", "worst_score"]


class StopReason(StrEnum):
    """Why training was asked to end; `NONE` while it goes on."""

    NONE = "none"
    NOT_FINITE = "not_finite"
    STOPPING_THRESHOLD = "stopping_threshold"
    DIVERGENCE_THRESHOLD = "divergence_threshold"
    PATIENCE = "patience"


@dataclass(frozen=True)
class StoppingRules:
    """What counts as better, as good enough and as hopeless.

    Attributes:
        mode: "min" when smaller values are better, "max" when larger ones are.
        min_delta: A value must be better than the best by more than this to count as an improvement.
        patience: Number of checks without improvement, in a row, after which training ends.
        check_finite: End at once when the value is NaN or infinite.
        stopping_threshold: End at once when the value is better than this. None: no such limit.
        divergence_threshold: End at once when the value is worse than this. None: no such limit.
    """

    mode: str = "min"
    min_delta: float = 0.0
    patience: int = 3
    check_finite: bool = True
    stopping_threshold: float | None = None
    divergence_threshold: float | None = None


@dataclass(frozen=True)
class StoppingState:
    """The best value so far, and the number of checks since it was seen."""

    best: float
    wait_count: int = 0


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check; `message` is empty when there is nothing to say."""

    state: StoppingState
    reason: StopReason
    message: str

    @property
    def stop(self) -> bool:
        return self.reason is not StopReason.NONE


def worst_score(mode: str) -> float:
    """The value that every finite value is better than."""
    return math.inf if mode == "min" else -math.inf


def is_better(value: float, than: float, mode: str) -> bool:
    """Whether `value` is strictly better; never so for NaN."""
    return value < than if mode == "min" else value > than


def judge(rules: StoppingRules, state: StoppingState, value: float, name: str = "the monitored value") -> Verdict:
    """Check one more value.

    A value that ends training by itself (not finite, past a threshold) leaves the state as it was.
    """
    stop = _limit_crossed(rules, value, name)
    if stop is not None:
        return Verdict(state, *stop)
    threshold = state.best - rules.min_delta if rules.mode == "min" else state.best + rules.min_delta
    if is_better(value, threshold, rules.mode):
        by = f" by {abs(state.best - value):.3g}" if math.isfinite(state.best) else ""
        return Verdict(StoppingState(value), StopReason.NONE, f"{name} improved{by}; the best is now {value:.6g}")
    waited = StoppingState(state.best, state.wait_count + 1)
    if waited.wait_count >= rules.patience:
        message = (
            f"{name} has not improved by more than {rules.min_delta:g} in the last {waited.wait_count} checks; "
            f"the best was {state.best:.6g}, the last is {value:.6g}"
        )
        return Verdict(waited, StopReason.PATIENCE, message)
    return Verdict(waited, StopReason.NONE, "")


def _limit_crossed(rules: StoppingRules, value: float, name: str) -> tuple[StopReason, str] | None:
    if rules.check_finite and not math.isfinite(value):
        return StopReason.NOT_FINITE, f"{name} is {value}, which is not finite"
    goal, limit = rules.stopping_threshold, rules.divergence_threshold
    if goal is not None and is_better(value, goal, rules.mode):
        return StopReason.STOPPING_THRESHOLD, f"{name} = {value:.6g} is better than stopping_threshold={goal:g}"
    if limit is not None and is_better(limit, value, rules.mode):
        return StopReason.DIVERGENCE_THRESHOLD, f"{name} = {value:.6g} is worse than divergence_threshold={limit:g}"
    return None
