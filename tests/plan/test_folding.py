"""What a thousand ranks say stays readable."""

from __future__ import annotations

import pytest

from raytrainer.errors import MetricError
from raytrainer.metric_messages import MetricReport, MetricSpec, Partial
from raytrainer.metrics.metric_board import MetricBoard
from raytrainer.plan.folding import by_text, few, ranks_text
from raytrainer.plan.versions import differences
from raytrainer.plan.where_it_is import Frame, Whereabouts, folded


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([], ""),
        ([4], "4"),
        ([3, 4], "3, 4"),
        ([9, 3, 5, 4, 0], "0, 3-5, 9"),
        (range(3, 999), "3-998"),
        (range(0, 1000, 2), ", ".join(str(2 * i) for i in range(20)) + " and 480 more"),
    ],
)
def test_ranks(ranks, text):
    assert ranks_text(ranks) == text


def test_few_and_groups():
    assert few(["a", "b"], 2) == "a, b" and few(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert by_text({2: "x", 0: "y", 1: "x"}) == [([0], "y"), ([1, 2], "x")]


def test_where_they_are():
    """A rank that keeps the others waiting has a line of its own."""
    user, wait = Frame("train.py", 7, "step"), Frame("distributed.py", 1, "all_reduce")

    def at(rank: int, waits: str) -> Whereabouts:
        return Whereabouts(rank, f"node{rank // 8} (pid {rank})", user, wait, waits, "")

    lines = folded([at(rank, "" if rank == 500 else "the collective all_reduce") for rank in range(1000)])
    assert lines == [
        "ranks 0-499, 501-999 (first on node0 (pid 0)): at train.py:7 in step, waiting for the collective all_reduce",
        "rank 500 on node62 (pid 500): at train.py:7 in step",
    ]


def test_names_that_ranks_did_not_log():
    spec = MetricSpec("loss", False, True, False, True, False, "mean")
    has = MetricReport({"loss": spec}, epoch={"loss": Partial(1.0, 1)})
    with pytest.raises(MetricError, match=r"epoch 3: ranks 1-999 did not log 'loss'\. Log the same"):
        MetricBoard().epoch_values([has, *(MetricReport() for _ in range(999))], "epoch 3")


def test_versions():
    own = {"Python": "3.11.4", "Ray": "2.60.0", "raytrainer": "1.0.0", "torch": "2.13.0"}
    nodes = {f"10.0.0.{i}": {**own, "torch": "2.12.0"} for i in range(200)}
    assert differences(own, nodes)[1] == [
        "torch 2.13.0 here, 2.12.0 on 10.0.0.0, 10.0.0.1, 10.0.0.2, 10.0.0.3 and 196 more"
    ]
