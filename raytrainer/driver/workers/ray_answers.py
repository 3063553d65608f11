"""Waiting for actors' answers; and of several failures, which one is told."""

from __future__ import annotations

import pickle
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import ray
from ray.exceptions import (
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from raytrainer.errors import (
    DisagreementError,
    RaytrainerError,
    ResourceError,
    SerializationError,
    WorkerError,
    WorkerLostError,
)
from raytrainer.plan.culprit import Failed, choose_culprit, is_consequence
from raytrainer.plan.errors_of_others import says_loader_died
from raytrainer.plan.folding import ranks_text
from raytrainer.plan.where_it_is import Whereabouts, folded, keep_waiting
from raytrainer.signals import PIECE, hear
from raytrainer.tracebacks import HINT
from raytrainer.worker.actor.actor import Failure
from raytrainer.worker.actor.module_pickling import Pickled
from raytrainer.worker.actor.place import Place

__all__ = ["Answers"]

#: Answers that are still to come, from which on they are not taken one by one; and seconds to let such come together.
MANY, TOGETHER = 8, 0.02

#: Seconds that other workers get to answer after one has failed: long enough to tell cause from consequence.
GRACE = 2.0

#: Seconds that workers that do not answer get to say where they are.
WHERE = 15.0


class Asked(Protocol):
    """The group whose workers are asked.

    Attributes:
        places: Where they are, by rank; empty before that is known.
        outputs: Files that their prints go to, by rank.
        stale: Whether the process group may hold half a collective: join anew before the next run.
    """

    places: list[Place]
    outputs: list[str | None]
    stale: bool

    def lose(self, ranks: Collection[int] = ()) -> None:
        """The group is of no use any more: these are gone, or keep the others waiting."""

    def whereabouts(self, patience: float) -> list[Whereabouts]:
        """Where they are."""


class Watch(Protocol):
    """Sees, in a wait for answers, that some will never come."""

    def look(self, answered: Collection[int]) -> None:
        """Called now and then, with the ranks that have answered; raises what is amiss."""


class Answers:
    """What a group's actors answer.

    Args:
        group: Is told what it has lost, or marked as stale, where a failure asks for that.
    """

    def __init__(self, group: Asked) -> None:
        self._group = group

    def all(
        self,
        refs: Sequence[Any],
        patience: float,
        what: str,
        ranks: Sequence[int] | None = None,
        watch: Watch | None = None,
    ) -> list[Any]:
        """All answers, in order; or the one failure to tell about, as soon as it can be told.

        Args:
            refs: One reference a worker.
            patience: Seconds to wait for the answers; without one after that, the workers count as lost.
            what: What they are to do, for the error that says so.
            ranks: The workers' ranks; None: they are the first ones, in order.
            watch: Whether they will ever answer.
        """
        of = dict(zip(refs, range(len(refs)) if ranks is None else ranks, strict=True))
        answers: dict[Any, Any] = {}
        pending = list(refs)
        deadline = time.monotonic() + patience
        failed = False
        while pending:
            left = deadline - time.monotonic()
            ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, min(PIECE, left)))
            if not ready:
                hear()
                if left <= PIECE:
                    break
                if watch is not None and not failed:
                    self._look(watch, range(len(self._group.places)), [of[ref] for ref in pending])
                continue
            if len(pending) >= MANY:  # one by one they cost the driver a fifth more than Ray itself does
                more, pending = ray.wait(pending, num_returns=len(pending), timeout=TOGETHER)
                ready += more
            found = self._answered(ready, of)
            answers.update(zip(ready, found, strict=True))
            if any(isinstance(answer, WorkerLostError) for answer in found):
                break  # the others may hang for ever
            if not failed and any(isinstance(answer, Failure) for answer in found):
                failed, deadline = True, time.monotonic() + GRACE
        failures: list[Failure | WorkerLostError]
        failures = [a for a in answers.values() if isinstance(a, (Failure, WorkerLostError))]
        if pending and not failures:
            silent = [of[ref] for ref in refs if ref in pending]
            reason = f"no answer from rank(s) [{ranks_text(silent)}] for {patience:.0f} s ({what})"
            # told before they are ended: which of them keeps the others waiting shows in what each one waits for
            found = [replace(each, seconds=None) for each in self._group.whereabouts(WHERE)]  # has been said
            lost = keep_waiting([each for each in found if each.rank in silent]) or silent
            self._group.lose(lost)
            raise WorkerLostError(lost[0], reason + "".join(f"\n  {line}" for line in folded(found)))
        if failures:
            self._raise(failures, hanging=len(pending))
        return [answers[ref] for ref in refs]

    def _look(self, watch: Watch, ranks: Sequence[int], pending: Sequence[int]) -> None:
        try:
            watch.look(set(ranks).difference(pending))
        except DisagreementError:
            self._group.lose()  # they would wait on
            raise

    def _answered(self, refs: Sequence[Any], of: Mapping[Any, int]) -> list[Any]:
        """What these have answered: fetched at once where nobody is lost, which is a tenth of the time for many."""
        if len(refs) > 1:
            try:
                return [answer.get() if isinstance(answer, Pickled) else answer for answer in ray.get(list(refs))]
            except RayError:
                pass
        return [self._answer(ref, of[ref]) for ref in refs]

    def _answer(self, ref: Any, rank: int) -> Any:
        try:
            answer = ray.get(ref)
            return answer.get() if isinstance(answer, Pickled) else answer
        except OutOfMemoryError as error:
            remedy = "Use smaller batches, fewer workers or loader processes on a node, or nodes with more memory."
            return WorkerLostError(
                rank, f"killed for its memory: {_lines(error)[0]}{self._whereabouts(rank)}. {remedy}"
            )
        except RayActorError as error:
            lines = _lines(error)
            # an actor that could not start says why in its last line: a package that its node lacks, say
            if "creation task" in lines[0] and len(lines) > 1:
                missing = "No module named" in lines[-1]
                remedy = ". Install it there, in the Python that `ray start` ran in" if missing else ""
                return WorkerLostError(rank, f"it could not start: {lines[-1]}{remedy}", could_start=False)
            return WorkerLostError(rank, lines[0] + self._whereabouts(rank))
        except RayTaskError as error:
            return self._unsendable(rank, error.cause or error)
        except RayError as error:
            said = f"{type(error).__name__}: {error}{self._whereabouts(rank)}"
            return WorkerLostError(rank, said, could_start=not isinstance(error, RuntimeEnvSetupError))

    def _unsendable(self, rank: int, error: BaseException) -> Failure:
        """A worker's methods raise nothing, so what Ray has met is an answer that cannot be sent, or a signal."""
        told: RaytrainerError | RuntimeError
        if says_loader_died(error):
            told = RuntimeError(str(error))
        elif isinstance(error, (ObjectStoreFullError, OutOfDiskError)):
            told = ResourceError(
                f"Ray has no room for what rank {rank} was to hand over: its object store there is full "
                f"({str(error).splitlines()[0]}). Give it more memory, with `ray start --object-store-memory=BYTES` or "
                f"ray.init(object_store_memory=BYTES) before the run, or disk to move objects to; in-memory snapshots "
                f"and checkpoints under way are kept there (Trainer(snapshot_every=None) has none of the former)."
            )
        else:
            told = SerializationError(
                f"what rank {rank} was to send to the driver cannot be pickled: {type(error).__name__}: {error}. "
                f"Return data from predict_step, and keep data in what comes home: tensors, numbers, strings, "
                f"containers of them."
            )
        node = self._group.places[rank].address if self._group.places else "?"
        return Failure(rank, node, type(told).__name__, str(told), f"{told}\n", pickle.dumps(told))

    def _whereabouts(self, rank: int) -> str:
        """Where a lost worker was, and where its last words are."""
        if not self._group.places:
            return ""
        place, output = self._group.places[rank], self._group.outputs[rank]
        return f" (on {place.host}, {place.address}{f'; its output: {output}' if output else ''})"

    def _raise(self, failures: Sequence[Failure | WorkerLostError], hanging: int) -> None:
        """Raise the failure that caused the others. Workers that all still answer are kept for the next run."""
        by_rank = {failure.rank: failure for failure in failures}
        culprit = by_rank[
            choose_culprit(
                [
                    Failed(f.rank, "lost")
                    if isinstance(f, WorkerLostError)
                    else Failed(f.rank, "raised", f.type_name, f.message)
                    for f in failures
                ]
            ).rank
        ]
        lost = [failure.rank for failure in failures if isinstance(failure, WorkerLostError)]
        if hanging or lost:
            self._group.lose(lost)
        else:
            self._group.stale = True
        if isinstance(culprit, WorkerLostError):
            raise culprit
        said = culprit.type_name, culprit.message
        if is_consequence(Failed(culprit.rank, "raised", culprit.type_name, culprit.message)):
            self._group.lose()
            raise WorkerLostError(
                culprit.rank, f"communication with the others failed: {culprit.message}", unreachable=True
            )
        alike = [
            f.rank for f in failures if isinstance(f, Failure) and f is not culprit and (f.type_name, f.message) == said
        ]
        others = f"Ranks {ranks_text(alike)} said the same.\n" if len(alike) > 1 else ""
        try:
            original = pickle.loads(culprit.pickled) if culprit.pickled is not None else None
        except Exception:
            original = None
        if isinstance(original, BaseException):  # which is told with the hint, below
            text = culprit.traceback.replace(f"{HINT}\n", "")
            raise original from WorkerError(culprit.rank, culprit.node, text + others)
        raise WorkerError(culprit.rank, culprit.node, culprit.traceback + others)


def _lines(error: RayError) -> list[str]:
    """What Ray says, without empty lines; at least one."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
