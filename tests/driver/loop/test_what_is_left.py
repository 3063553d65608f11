"""An epoch ends for all workers when it ends for one; whose data is left over is told."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from raytrainer.data.look_ahead import LookAhead
from raytrainer.driver.loop.chunks import Chunks


@pytest.fixture
def chunks():
    state = SimpleNamespace(progress=SimpleNamespace(epoch=2))
    return Chunks(None, state, None, None, None, None, ())


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([5, 5], None),
        ([5, None], None),
        (
            [7, 5],
            "Epoch 2 ends for all workers after 5 batches, where the loader of rank 1 comes to its end; that of rank 0",
        ),
        ([5, 5, 6, 7], "loader of ranks 0, 1 comes to its end; that of ranks 2, 3 has more, which is not trained on"),
    ],
)
def test_known_lengths_that_differ(chunks, caplog, lengths, said):
    caplog.set_level(logging.WARNING, "raytrainer")
    for _ in range(2):  # told once
        assert chunks.common_length(lengths) == (None if None in lengths else 5)
    assert [said in record.getMessage() for record in caplog.records] == ([] if said is None else [True])


@pytest.mark.parametrize(("others", "left"), [(3, False), (2, True), (1, True)])
def test_a_stream_that_is_not_at_its_end(others, left):
    asked = iter([True] * others + [False] * 9)
    reader = LookAhead(iter(range(3)), lambda more: more and next(asked))
    assert len(list(reader)) == min(3, others) and reader.leaves is left
