from __future__ import annotations

import pytest

from raytrainer.plan.ranks import Ranks, assign_ranks


@pytest.mark.parametrize(
    ("nodes", "ranks"),
    [
        (["a"], [0]),
        (["a", "a"], [0, 1]),
        (["a", "b"], [0, 1]),
        (["a", "b", "a", "b"], [0, 2, 1, 3]),
        (["b", "a", "b"], [0, 2, 1]),
    ],
)
def test_global_ranks_run_node_by_node(nodes, ranks):
    assert [r.rank for r in assign_ranks(nodes)] == ranks


def test_all_fields():
    assert assign_ranks(["a", "b", "a"]) == [
        Ranks(0, 3, 0, 2, 0, 2),
        Ranks(2, 3, 0, 1, 1, 2),
        Ranks(1, 3, 1, 2, 0, 2),
    ]


def test_alone():
    assert assign_ranks(["a"]) == [Ranks()]
