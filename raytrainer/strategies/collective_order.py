"""The order in which workers gather and reduce in training steps: known from earlier steps, and seen to be the same.

Collectives pair by their order. Where user code decides what comes next (a layer that is left out at random, a
`manual_backward` that one worker does not call), one worker's gathering of a block would be taken for the gathering of
another block, without a word; or all would wait for ever. So workers tell the group's store what they do in a step of
which there is no record. Later steps are compared with the record, which takes no talking; a worker that does something
else in one waits for all others to do the same, unless it learns that one of them has gone on otherwise.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from raytrainer.errors import DisagreementError
from raytrainer.strategies.positions import Positions

__all__ = ["END", "EVALUATION", "NOBODY", "NO_MODULE", "CollectiveOrder", "Event"]

#: (what, which module, numbers sent): "gather" or "reduce"; or what is called by the user's own code, of no module.
Event = tuple[str, int, int]

#: In the place of a module's index.
NO_MODULE = -1

_CALLED = {"all_gather": "self.all_gather", "clip": "clipping gradients"}

#: What a step may end with: it is over, or no worker has done anything in it.
END, NOBODY = "end", "nobody"

#: The kind of an evaluation's steps.
EVALUATION = "evaluation"

#: How many different steps of a kind are remembered, so that one which is like any of them costs nothing.
_KNOWN = 32

#: Seconds that a worker waits for others to do what they have not done in earlier steps.
_PATIENCE = 300.0

#: Seconds that it waits before it asks where they are, and between two times that it does.
_ASK_EVERY = 0.5

#: Seconds between two looks for others, at first and at last.
_SOON, _LATER = 0.0005, 0.02

_IN_TRAINING = (
    ", and call manual_backward equally often. Draw what decides on that alike on all workers; to skip a batch, return "
    "None from training_step before anything else (with manual optimization: call manual_backward with a loss of zero, "
    "such as 0.0 * self(x).sum())."
)
_IN_EVALUATIONS = (
    ", and equally often. Draw what decides on that alike on all workers; let a loop that generates run for as many "
    "passes on each (min_new_tokens=max_new_tokens, with transformers)."
)


class CollectiveOrder:
    """What one worker does, step by step.

    Args:
        store: A store of all workers.
        name: Of its own in the store.
        names: The modules', by index.
        timeout: Seconds that a collective waits for the others.
    """

    def __init__(self, store: Any, name: str, names: Sequence[str], timeout: float) -> None:
        self._store, self._name, self._names = store, name, names
        self._patience = min(timeout / 2, _PATIENCE)
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._known: dict[Any, list[list[Event]]] = {}  # what steps of a kind do; the latest first
        self._kind: Any = None
        self._follows: list[Event] | None = None  # what this step does so far, as one before it
        self._step, self._over = 0, False
        self._left: list[list[str]] = []  # keys of the latest meetings
        self.happened: list[Event] = []
        self._positions: Positions | None = None
        if self._size > 1:
            self._positions = Positions(store, name, self._rank, self._size, weakref.WeakMethod(self._word_at))

    def _word_at(self, step: int, place: int) -> str | None:
        """See `Positions`."""
        now = self._step  # before the events, which a new step drops before it has a number
        happened = self.happened
        if now == step:
            return _word(happened[place]) if place < len(happened) else "" if self._over else None
        return "" if now > step else None

    def forget(self) -> None:
        """What is trained has changed: the next step of each kind is told again."""
        self._known = {kind: steps for kind, steps in self._known.items() if kind == EVALUATION}

    def begin(self, kind: Any) -> None:
        """A step begins. All workers' steps of one kind are expected to do the same."""
        self._over = False  # before the step has a number, by which others ask for it
        self._kind, self.happened = kind, []
        self._step += 1
        self._follows = next(iter(self._known.get(kind, [])), None)

    @property
    def expected(self) -> list[Event] | None:
        """What the step does if it is like those before it."""
        return self._follows

    def note(self, event: Event) -> None:
        """This worker is about to do something that needs the others.

        Raises:
            DisagreementError: Others do something else.
        """
        position, follows = len(self.happened), self._follows
        if follows is None:
            self._tell(position, _word(event))
        elif position >= len(follows) or follows[position] != event:
            self._meet(position, _word(event))
            self._follows = self._like([*self.happened, event])
        self.happened.append(event)

    def end(self) -> None:
        """The step is over.

        Raises:
            DisagreementError: It is not, for others.
        """
        follows = self._follows
        if follows is None or len(follows) != len(self.happened):
            self._meet(len(self.happened), END)
        known = self._known.setdefault(self._kind, [])
        self._over = True  # and the next one may begin late
        if not known or known[0] != self.happened:
            known[:] = [self.happened, *(steps for steps in known if steps != self.happened)][:_KNOWN]

    def nobody(self) -> None:
        """No worker does anything in this step."""
        self._tell(len(self.happened), NOBODY)

    def count(self, what: str, more: int = 1) -> int:
        """How many workers have said `what` of this step, with this one if it does."""
        return int(self._store.add(f"{self._name}/{self._step}/{what}", more))

    def next_word(self) -> Event | str:
        """What the others do next: an event; END or NOBODY. Waits for them to tell."""
        word = self._store.get(self._key(len(self.happened))).decode()
        if word in (END, NOBODY):
            return str(word)
        what, index, numbers = word.split()
        return what, int(index), int(numbers)

    def _like(self, steps: list[Event]) -> list[Event] | None:
        found = (known for known in self._known.get(self._kind, []) if known[: len(steps)] == steps)
        return next(found, None)

    def _key(self, position: int) -> str:
        return f"{self._name}/{self._step}/{position}"

    def _tell(self, position: int, word: str) -> None:
        there = self._store.compare_set(self._key(position), "", word).decode()
        if there != word:
            raise self._disagreement(word, f"where another one comes to {self._shown(there)}")

    def _meet(self, position: int, word: str) -> None:
        """Go on when all workers are about to do this."""
        self._tell(position, word)
        keys = [self._key(position), f"{self._key(position)}/here", f"{self._key(position)}/all"]
        if self._store.add(keys[1], 1) == self._size:
            self._store.set(keys[2], "")
        self._await(keys[2], position, word)
        # all have left the meeting before the last one
        self._left.append(keys)
        if len(self._left) > 2:
            old = self._left.pop(0)
            for key in old if self._rank == 0 else ():
                self._store.delete_key(key)

    def _await(self, key: str, position: int, word: str) -> None:
        """Wait for all others to have come."""
        now = begun = time.monotonic()
        ask, pause = now + _ASK_EVERY, _SOON
        while not self._store.check([key]):
            if now - begun > self._patience:
                others = f"to which others have not come for {self._patience:.0f} s"
                raise self._disagreement(word, others)
            if now > ask and self._positions is not None:
                gone = self._positions.gone_on(self._step, position, word)
                if gone is not None:
                    rank, theirs = gone
                    raise self._disagreement(word, f"where rank {rank} has come to {self._shown(theirs or END)}")
                ask = time.monotonic() + _ASK_EVERY
            time.sleep(pause)
            pause = min(2 * pause, _LATER)
            now = time.monotonic()

    def _disagreement(self, word: str, others: str) -> DisagreementError:
        before = f" after {self._shown(_word(self.happened[-1]))}" if self.happened else ""
        evaluates = self._kind == EVALUATION
        remedy = _IN_EVALUATIONS if evaluates else _IN_TRAINING
        return DisagreementError(
            f"workers do different things in one {'evaluation' if evaluates else 'training'} step: rank {self._rank} "
            f"comes to {self._shown(word)}{before}, {others}. With fsdp all workers gather each layer's parameters "
            f"together, so that all must use the same layers, and call self.all_gather and clip_gradients, in the same "
            f"order{remedy}"
        )

    def left_out(self, event: Event) -> DisagreementError:
        """The error of a step that this worker skips, and in which others call something."""
        return self._disagreement(END, f"where others come to {self._shown(_word(event))}")

    def not_as(self, rank: int, index: int, theirs: int) -> DisagreementError:
        """The error of a step in which not all compute: rank `rank` gathers `theirs` (-1: it is done), not `index`."""
        self._kind, self.happened = EVALUATION, []
        ours, others = (END if i < 0 else f"gather {i} 0" for i in (index, theirs))
        return self._disagreement(ours, f"where rank {rank} comes to {self._shown(others)}")

    def _shown(self, word: str) -> str:
        if word in (END, NOBODY):
            return "its end"
        what, index, _ = word.split()
        if what in _CALLED:
            return _CALLED[what]
        name = self._names[int(index)]
        part = repr(name) if name else "what is in no block"
        return f"{'gathering' if what == 'gather' else 'averaging the gradients of'} {part}"


def _word(event: Event) -> str:
    return " ".join(map(str, event))
