"""Which moment all workers can go back to, when some are lost and each has written down what it alone has.

A *moment* is (chunk, batches done in it); all workers pass the same ones in the same order. At the end of each batch a
worker copies weights and optimizer, which all have alike, into memory of its own (its *copies*), and only then writes
its *record* of what it alone has into memory that outlives its process. Of both it keeps the last two, in turn, so that
one that is half written (its checksum tells; a copy has its moment when it is whole) leaves the one before.

Where can each be when one of them is killed? In batch k, nobody is past the averaging of gradients before all have
begun it, which each does after its record of k - 1:

    killed                              its newest    the others' newest            all have    repeated
    before its part of averaging k      k - 1         k - 1: they wait for it       k - 1       batch k
    after that, before its step         k - 1         k - 1 or k, as they finish    k - 1       batch k
    between step (or hook) and record   k - 1         k - 1 or k                    k - 1       batch k
    while it writes its record          k - 1         k - 1 or k                    k - 1       batch k
    after its record                    k             k - 1 or k                    the lower   batch k, or none

So the newest of who has least is had by all: a worker that is one ahead still has the one before, of which its copies
are too, whatever its optimizer has done since. Nothing is asked of the live weights, which hooks may have changed at
any time. Copies of one survivor are enough; the record of the lost one is read by whoever is left.

A GPU is behind the worker that tells it what to do, and what it has of a moment exists when it has come to that. So a
record there is written with the next moment: the worker waits until the GPU has come to moment k, writes the record of
k, has the GPU copy weights and optimizer for k + 1, and goes on to tell it batch k + 2. The GPU has work all the while,
and a worker is never more than one moment ahead of it. A record of k then says that this worker's GPU had all others'
parts of averaging k; each other one had been told its part, after its own record of k - 2. So:

    one has recorded          k
    another may have          k - 2, at least, which is then what all have
    the first one's GPU may   have been told to copy for k + 1, which is as good as done

The last four of each are kept, k - 2 to k + 1.

Whose NCCL is ended (or ends itself, as with some settings) sees its GPU go on with sums that are none, to steps and
copies that are no better. These are of moments that the worker has not recorded yet: it writes no record once its NCCL
is about to be ended, and waits for one moment only, so that none of what it had recorded is copied over. And the lost
worker has no record of them either, as it took no full part in their averaging; so all do not have them.

It also holds where nothing is averaged (each rank's loss is None, manual optimization): then a worker may be further
ahead, all have no moment in common, and the newest snapshot serves. So it does where nobody is left who has copies.

A chunk begins with a record too, as hooks have been called since the one before has ended; not in an epoch's first
chunk, whose hooks are called again by whoever begins the epoch anew. A worker that is lost before that record shares
the end of the chunk before, from which the driver does again what comes between the two.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

__all__ = ["KEPT", "KEPT_BEHIND", "Moment", "common_moment"]

#: Of how many moments each keeps records and copies: on CPUs, and where a GPU is behind its worker.
KEPT, KEPT_BEHIND = 2, 4

#: A chunk's number, and how many batches of it were done.
Moment = tuple[int, int]


def common_moment(
    written: Sequence[Collection[Moment]], copied: Mapping[int, Collection[Moment]], chunks: Collection[int]
) -> tuple[Moment, int] | None:
    """The moment to go on from, and the rank whose copies serve; None: there is none.

    Args:
        written: By rank, the moments of which there are whole records.
        copied: Of each rank that is left, the moments of which it has copies.
        chunks: Those whose beginning the driver remembers.
    """
    if not written or not all(written):
        return None
    moment = min(max(moments) for moments in written)
    holders = sorted(rank for rank, moments in copied.items() if moment in moments)
    if not holders or moment[0] not in chunks or not all(moment in moments for moments in written):
        return None
    return moment, holders[0]
