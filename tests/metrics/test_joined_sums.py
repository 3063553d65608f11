"""What several workers have summed up of an epoch, as that of one: fewer go on with it."""

from __future__ import annotations

import pytest

from raytrainer.metric_messages import MetricReport, MetricSpec, Partial, StepRow
from raytrainer.metrics.metric_slots import joined_sums


def sums(name: str, reduce: str, folded: list[float], custom: list[float] | None = None, loaders: tuple[int, ...] = ()):
    return {
        "key": ["training_step", name, None], "spec": {"reduce": reduce}, "folded": folded, "custom": custom or [],
        "loaders": list(loaders),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reduce", "folded"), [("mean", [7.0, 5]), ("sum", [7.0, 5]), ("min", [3.0, 5]), ("max", [4.0, 5])]
)
def test_sums(reduce, folded):
    (joined,) = joined_sums([[sums("a", reduce, [4.0, 2])], [], [sums("a", reduce, [3.0, 3])]])
    assert joined == sums("a", reduce, folded)


def test_custom_reductions_and_names_of_some():
    one = [sums("a", "custom", [], [1.0, 2.0], (0,)), sums("b", "mean", [1.0, 1])]
    other = [sums("a", "custom", [], [5.0], (1,))]
    assert joined_sums([one, other]) == [sums("a", "custom", [], [1.0, 2.0, 5.0], (0, 1)), one[1]]
    assert joined_sums([]) == []


def test_what_counts_of_other_ranks():
    """The driver is sent no more of a rank than it looks at."""
    specs = {
        name: MetricSpec(name, True, True, False, True, sync_dist=name == "synced", reduce="mean")
        for name in ("own", "synced", "ended")
    }
    values = dict.fromkeys(specs, 1.0)
    rows = [StepRow(49, 0, {spec.step_name: 1.0 for spec in specs.values()})]
    report = MetricReport(specs, rows, values, {"ended": Partial(1.0, 1)}, stop=True).shared()
    assert report.step == {"synced": 1.0} and report.rows == [StepRow(49, 0, {"synced_step": 1.0})]
    assert set(report.specs) == {"ended"} and set(report.epoch) == {"ended"} and report.stop
