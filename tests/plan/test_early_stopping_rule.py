from __future__ import annotations

import math

import pytest

from raytrainer.plan.early_stopping_rule import StoppingRules, StoppingState, StopReason, judge, worst_score

NAN, INF = math.nan, math.inf
PATIENCE, GOES_ON = StopReason.PATIENCE, StopReason.NONE


def run(rules: StoppingRules, values: list[float]) -> tuple[int | None, StopReason, StoppingState]:
    """(index of the value that ended it, why, the state then)."""
    state = StoppingState(worst_score(rules.mode))
    for index, value in enumerate(values):
        verdict = judge(rules, state, value)
        state = verdict.state
        if verdict.stop:
            assert verdict.message
            return index, verdict.reason, state
    return None, GOES_ON, state


@pytest.mark.parametrize(
    ("rules", "values", "stops_at", "reason", "best", "waited"),
    [
        (StoppingRules(patience=2), [3, 2, 1], None, GOES_ON, 1, 0),
        (StoppingRules(patience=2), [1, 1, 1], 2, PATIENCE, 1, 2),
        (StoppingRules(patience=2), [1, 2, 0.5, 2, 2], 4, PATIENCE, 0.5, 2),
        (StoppingRules(patience=0), [1, 0.5, 2], 2, PATIENCE, 0.5, 1),
        (StoppingRules(mode="max", patience=1), [1, 2, 2], 2, PATIENCE, 2, 1),
        (StoppingRules(mode="max", patience=3), [-3, -2, -1], None, GOES_ON, -1, 0),
        # exactly min_delta is no improvement
        (StoppingRules(min_delta=0.5, patience=1), [2, 1.5], 1, PATIENCE, 2, 1),
        (StoppingRules(min_delta=0.5, patience=1), [2, 1.25], None, GOES_ON, 1.25, 0),
        (StoppingRules(mode="max", min_delta=0.5, patience=1), [1, 1.5], 1, PATIENCE, 1, 1),
        (StoppingRules(mode="max", min_delta=0.5, patience=1), [1, 1.75], None, GOES_ON, 1.75, 0),
        # small steps add up against the best, not against the last
        (StoppingRules(min_delta=1, patience=2), [9, 8.5, 8.1], 2, PATIENCE, 9, 2),
        (StoppingRules(min_delta=1, patience=2), [9, 8.5, 7.9], None, GOES_ON, 7.9, 0),
        (StoppingRules(), [1, NAN], 1, StopReason.NOT_FINITE, 1, 0),
        (StoppingRules(), [1, -INF], 1, StopReason.NOT_FINITE, 1, 0),
        (StoppingRules(check_finite=False, patience=2), [1, NAN, NAN], 2, PATIENCE, 1, 2),
        (StoppingRules(check_finite=False, patience=2), [NAN, 1], None, GOES_ON, 1, 0),
        (StoppingRules(stopping_threshold=0.5), [1, 0.5, 0.4], 2, StopReason.STOPPING_THRESHOLD, 0.5, 0),
        (StoppingRules(mode="max", stopping_threshold=0.9), [0.9, 0.95], 1, StopReason.STOPPING_THRESHOLD, 0.9, 0),
        (StoppingRules(divergence_threshold=5), [1, 5, 6], 2, StopReason.DIVERGENCE_THRESHOLD, 1, 1),
        (StoppingRules(mode="max", divergence_threshold=0), [1, 0, -1], 2, StopReason.DIVERGENCE_THRESHOLD, 1, 1),
    ],
)
def test_decisions(rules, values, stops_at, reason, best, waited):
    assert run(rules, values) == (stops_at, reason, StoppingState(best, waited))
