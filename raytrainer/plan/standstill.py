"""Workers that wait for each other, so that none of them ever goes on: told from where each one is, several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytrainer.plan.folding import by_text
from raytrainer.plan.where_it_is import DRIVER, Whereabouts, waits_for_workers

__all__ = ["LOOKS", "Look", "standstill"]

#: How often workers have to be seen in the same places.
LOOKS = 3

#: Share of a processor that a worker takes which does nothing but wait; threads of Ray's do a little.
_IDLE = 0.05

#: Bytes that it sends or writes in a second; a transfer by a slow network takes more. What it says when asked is some.
_SILENT = 32768.0

#: How often it begins to wait meanwhile: each question wakes it. One that goes from message to message does so more.
_TURNS = 50

#: What a wait for workers ends in: code within that may wait for something else.
_ENDS = ("torch/autograd/graph.py", "torch/_ops.py")
_END_WITHIN = ("torch/distributed/", "raytrainer/strategies/")


@dataclass(frozen=True)
class Look:
    """Where workers were.

    Attributes:
        at: When they were asked, in seconds.
        answered: Ranks that had done by then what the driver has told them.
        found: Where each one was.
    """

    at: float
    answered: frozenset[int]
    found: Sequence[Whereabouts]


def standstill(looks: Sequence[Look]) -> str | None:
    """What the workers wait for, if they wait for each other for ever; None: that is not certain.

    A collective that all have entered may be slow, and somebody who computes may come yet. So all that had not answered
    at the first look must have been seen waiting in the same place at each one, without computing or sending anything
    in between, and not all workers in one place. Who has answered takes part in nothing before the others have, too.

    Args:
        looks: The latest ones.
    """
    if len(looks) < LOOKS:
        return None
    first, last, answered = looks[0].found, looks[-1].found, looks[0].answered
    seconds = looks[-1].at - looks[0].at
    for look in looks:
        if [each.rank for each in look.found] != [each.rank for each in last]:
            return None
        for each, before in zip(look.found, first, strict=True):
            if each.rank not in answered and not (_waits(each) and _place(each) == _place(before)):
                return None
    waiting = [each for each in last if each.rank not in answered]
    pairs = zip(first, last, strict=True)
    if not waiting or any(_does(before, after, seconds, after.rank in answered) for before, after in pairs):
        return None
    if not answered and len({_place(each) for each in waiting}) == 1:
        return None
    said = {each.rank: _said(each, each.rank in answered) for each in last}
    lines = [f"  rank{'s' * (len(of) > 1)} {', '.join(map(str, of[:8]))}{' ...' * (len(of) > 8)}: {text}"
             for of, text in by_text(said)]  # fmt: skip
    return (
        f"workers wait for each other, and none of them can go on (seen for {seconds:.0f} s):\n"
        + "\n".join(lines)
        + "\nWhat needs all workers (self.all_gather, functions of torch.distributed, clip_gradients of a model in "
        "shards, -1 from on_train_batch_start) must be called by all of them, equally often and in the same order: "
        "let conditions around it be the same on all workers."
    )


def _place(each: Whereabouts) -> tuple[object, ...]:
    """What stays the same while it waits; a loop that looks for others takes turns of its own lines."""
    inner = each.innermost
    return each.user, inner and (inner.file, inner.function), each.waits_for, each.batch


def _waits(each: Whereabouts) -> bool:
    """Whether it waits for other workers, and not, within what does so elsewhere, for a compiler or a file."""
    if each.innermost is None or not waits_for_workers(each):
        return False
    file = each.innermost.file.replace("\\", "/")
    return file.endswith(_ENDS) or any(part in file for part in _END_WITHIN)


def _does(before: Whereabouts, after: Whereabouts, seconds: float, answered: bool) -> bool:
    """Whether a worker may have done something from which others go on; one that has answered may still be sending."""
    if not _within(before.written, after.written, _SILENT * seconds):
        return True
    if answered:
        return False
    looks_again = after.waits_for == "the other workers"  # a loop of this package's own
    return not (
        _within(before.processor, after.processor, _IDLE * seconds)
        and (looks_again or _within(before.turns, after.turns, _TURNS))
    )


def _within(before: float | None, after: float | None, most: float) -> bool:
    """Whether a count has risen by no more; not if it is not known, or has fallen, as when a child has gone."""
    return before is not None and after is not None and 0.0 <= after - before <= most


def _said(each: Whereabouts, answered: bool) -> str:
    if answered:
        return f"is through with that, waiting for {DRIVER}"
    batch = f"in batch {each.batch}, " if each.batch is not None else ""
    return f"{batch}{each.where}"
