"""Which moment all workers go back to, whoever is killed and wherever."""

from __future__ import annotations

import itertools

import pytest

from raytrainer.plan.common_moment import KEPT_BEHIND, Moment, common_moment


@pytest.mark.parametrize(
    ("written", "copied", "chunks", "chosen"),
    [
        pytest.param([[(4, 1), (4, 2)]] * 2, {0: [(4, 1), (4, 2)]}, (3, 4), ((4, 2), 0), id="none-is-ahead"),
        pytest.param([[(4, 2), (4, 3)], [(4, 1), (4, 2)]], {0: [(4, 2), (4, 3)]}, (4,), ((4, 2), 0), id="one-is-ahead"),
        pytest.param(
            [[(4, 1), (4, 2)], [(4, 2), (4, 3)]], {0: [(4, 1), (4, 2)]}, (4,), ((4, 2), 0), id="lost-is-ahead"
        ),
        pytest.param([[(4, 3)], [(4, 2), (4, 3)]], {1: [(4, 3)]}, (4,), ((4, 3), 1), id="half-a-record"),
        pytest.param(
            [[(3, 7), (4, 0)], [(3, 6), (3, 7)]], {0: [(3, 7), (4, 0)]}, (3, 4), ((3, 7), 0), id="chunk-before"
        ),
        pytest.param([[(3, 7), (4, 1)], [(3, 6), (3, 7)]], {0: [(3, 7), (4, 1)]}, (3, 4), ((3, 7), 0), id="new-epoch"),
        pytest.param([[(3, 7), (4, 0)], [(3, 6), (3, 7)]], {0: [(3, 7), (4, 0)]}, (4,), None, id="chunk-is-forgotten"),
        pytest.param([[(4, 3), (4, 4)], [(4, 1), (4, 2)]], {0: [(4, 3), (4, 4)]}, (4,), None, id="two-ahead"),
        pytest.param([[(4, 1), (4, 2)], []], {0: [(4, 1), (4, 2)]}, (4,), None, id="nothing-recorded"),
        pytest.param([[(4, 1)], [(4, 1)]], {}, (4,), None, id="nobody-is-left"),
        pytest.param([[(4, 1)], [(4, 1)]], {0: []}, (4,), None, id="nobody-has-copies"),
        pytest.param([[(4, 1)]] * 3, {2: [(4, 1)], 1: [(4, 1)]}, (4,), ((4, 1), 1), id="lowest-rank"),
        pytest.param([], {}, (), None, id="no-group"),
    ],
)
def test_moments(written, copied, chunks, chosen):
    assert common_moment(written, copied, chunks) == chosen


def test_wherever_each_is_no_more_than_a_batch_is_repeated():
    """Three workers, each anywhere that averaging lets it be; each of them is the one that is killed."""
    batches = 6

    def kept(done: int) -> list[Moment]:
        return [(1, number) for number in range(done + 1)][-2:]

    for done in itertools.product(range(batches), repeat=3):
        if max(done) - min(done) > 1:  # nobody is past the averaging of a batch before all have begun it
            continue
        for lost in range(3):
            written = [kept(own) for own in done]
            chosen = common_moment(written, {rank: written[rank] for rank in range(3) if rank != lost}, [1])
            assert chosen is not None and chosen[0] == (1, min(done))
            assert chosen[1] != lost


def test_wherever_each_is_whose_device_is_behind_all_have_what_is_chosen():
    """Likewise; each has recorded a moment, and may be writing the next record, with copies of it under way."""
    for done in itertools.product(range(KEPT_BEHIND, 9), repeat=3):
        if (
            max(done) - min(done) > 2
        ):  # who has recorded k has seen all averaged that were told after they recorded k - 2
            continue
        for lost, busy in itertools.product(range(3), itertools.product([False, True], repeat=3)):
            kept = [
                [(1, number) for number in range(own - KEPT_BEHIND + 1 + more, own + 1)]
                for own, more in zip(done, busy, strict=True)
            ]
            left = {rank: kept[rank] for rank in range(3) if rank != lost}
            chosen = common_moment(kept, left, [1])
            assert chosen is not None and chosen[0] == (1, min(done)) and chosen[1] != lost


def test_what_a_device_does_after_the_loss_is_not_chosen():
    """The lost worker has no record of what it took no part in, whatever those that are left take for their records."""
    written = [[(1, 2), (1, 3), (1, 4), (1, 5)], [(1, 0), (1, 1), (1, 2), (1, 3)], [(1, 1), (1, 2), (1, 3), (1, 4)]]
    chosen = common_moment(written, {0: written[0], 2: written[2]}, [1])
    assert chosen == ((1, 3), 0)
