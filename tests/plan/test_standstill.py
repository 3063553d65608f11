"""When workers are known to wait for each other for ever, from where they were seen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raytrainer.plan.standstill import LOOKS, Look, standstill
from raytrainer.plan.where_it_is import DRIVER, Frame, Whereabouts

LINE = Frame("train.py", 15, "training_step")
ENGINE = Frame("torch/autograd/graph.py", 979, "_engine_run_backward")
AVERAGES = "the backward pass, and in it averages over the workers"
GATHER = Frame("torch/distributed/distributed_c10d.py", 7, "all_gather")
BACKWARD = Whereabouts(0, "pid 1", None, ENGINE, AVERAGES, "", 9.0, 2, 5.0, 7e9, 30)
GATHERS = Whereabouts(1, "pid 2", LINE, GATHER, "the collective all_gather", "", 9.0, 2, 5.0, 7e9, 30)
IDLE = Whereabouts(0, "pid 1", None, Frame("x.py", 1, "f"), DRIVER, "", written=0.0)


def looks(*each, answered=(), computes=0.0, writes=0, turns=0):
    """As often as is needed, five seconds apart; `computes` and so on is what each one does from look to look."""
    return [
        Look(
            10.0 + 5 * n,
            frozenset(answered),
            [
                replace(
                    e,
                    processor=e.processor and e.processor + n * computes,
                    written=e.written and e.written + n * writes,
                    turns=e.turns and e.turns + n * turns,
                )
                for e in each
            ],
        )
        for n in range(LOOKS)
    ]


def test_one_that_is_where_the_others_do_not_come():
    told = standstill(looks(BACKWARD, GATHERS))
    assert "rank 0: in batch 2, in no code of yours" in told and "(seen for 10 s)" in told
    assert "rank 1: in batch 2, at train.py:15 in training_step, waiting for the collective all_gather" in told
    assert "self.all_gather" in told and "same on all workers" in told


def test_one_that_nobody_is_left_to_meet():
    told = standstill(looks(IDLE, GATHERS, answered={0}))
    assert "rank 0: is through with that, waiting for the driver" in told
    both = standstill(looks(IDLE, GATHERS, replace(GATHERS, rank=2), answered={0}))
    assert "ranks 1, 2: in batch 2, at train.py:15" in both


COMPUTES = replace(BACKWARD, waits_for="", user=LINE)
COMPILES = replace(BACKWARD, innermost=Frame("lib/python3.11/threading.py", 320, "wait"))
SENDS = replace(IDLE, written=1.0)


@pytest.mark.parametrize(
    "seen",
    [
        looks(BACKWARD, GATHERS)[1:],
        looks(BACKWARD, replace(BACKWARD, rank=1)),  # a slow network
        looks(BACKWARD, GATHERS, computes=1.0),
        looks(BACKWARD, GATHERS, computes=-1.0),  # a child has ended, and nobody knows what it has done
        looks(BACKWARD, GATHERS, writes=1 << 20),  # by a slow network
        looks(SENDS, GATHERS, answered={0}, writes=1 << 20),  # what it sends is sent yet
        looks(BACKWARD, GATHERS, turns=100),  # many small ones
        looks(COMPILES, GATHERS),  # the backward pass, by another program
        looks(replace(BACKWARD, written=None), GATHERS),
        looks(replace(BACKWARD, turns=None), GATHERS),
        looks(COMPUTES, GATHERS),
        looks(replace(BACKWARD, innermost=None), GATHERS),  # does not answer
        looks(IDLE, GATHERS),  # has not begun
        looks(replace(BACKWARD, waits_for="the GPU"), GATHERS),
        looks(replace(BACKWARD, processor=None), GATHERS),
        looks(replace(IDLE, rank=0), replace(IDLE, rank=1), answered={0, 1}),
        [*looks(COMPUTES, GATHERS)[:1], *looks(IDLE, GATHERS, answered={0})[1:]],  # came to its end only now
        [*looks(BACKWARD, replace(GATHERS, batch=1))[:1], *looks(BACKWARD, GATHERS)[1:]],
        [*looks(BACKWARD, replace(GATHERS, user=replace(LINE, line=16)))[:1], *looks(BACKWARD, GATHERS)[1:]],
    ],
)
def test_what_is_not_certain(seen):
    assert standstill(seen) is None


def test_a_loop_that_looks_for_others_takes_turns_of_its_own_lines():
    seen = looks(BACKWARD, replace(GATHERS, user=None, waits_for="the other workers"))
    other = replace(seen[1].found[1], innermost=replace(GATHER, line=8))
    seen[1] = replace(seen[1], found=[seen[1].found[0], other])
    seen[2].found[1] = replace(seen[2].found[1], turns=5000)
    assert standstill(seen) is not None
