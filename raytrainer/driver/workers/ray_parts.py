"""Pieces of tensors in Ray's shared memory: read by whoever needs some, and written by the nodes that have them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrainer.checkpointing.new_checkpoint import NewCheckpoint
from raytrainer.checkpointing.part_file import PartPlan, PartRecord, write_part
from raytrainer.checkpointing.part_writer import write_parts
from raytrainer.checkpointing.pieces_elsewhere import PiecesElsewhere
from raytrainer.driver.cluster.inherited import changed_environment
from raytrainer.driver.cluster.session import nodes_alive
from raytrainer.errors import CheckpointError, GivenUpError
from raytrainer.worker.actor.actor import Failure
from raytrainer.worker.actor.pieces_apart import PieceInRay

__all__ = ["PiecesInRay"]

log = logging.getLogger("raytrainer")

#: Seconds between looks at whether there is still time for a checkpoint.
_LOOK = 0.2

#: Seconds that a node's process gets to delete what it has half written, before it is killed.
_PATIENCE = 10.0


class PiecesInRay(PiecesElsewhere):
    """The pieces of a group of actors, which each node's shared memory has.

    A node's are written by a process there, beside the workers. Where that process does not see the checkpoint's
    folder, or ends, this process fetches them and writes them itself.

    Args:
        layouts: By rank, where each of its pieces belongs: "at", "shape", and the "dtype" of its numbers.
        refs: By rank, Ray's reference to their bytes.
        nodes: By rank, the id of its node.
        lost: The error for what is gone, by a reason.
    """

    def __init__(
        self,
        layouts: Sequence[Mapping[str, Mapping[str, Any]]],
        refs: Sequence[Any],
        nodes: Sequence[str],
        lost: Callable[[str], CheckpointError],
    ) -> None:
        self._refs, self._nodes, self._lost = refs, nodes, lost
        self._pieces = [
            {
                key: {"at": at["at"], "shape": at["shape"], "data": self._piece(rank, key, at)}
                for key, at in layout.items()
            }
            for rank, layout in enumerate(layouts)
        ]

    def _piece(self, rank: int, key: str, at: Mapping[str, Any]) -> Any:
        """What stands for a piece, wherever it is asked for."""
        return PieceInRay(self._refs[rank], key, at["dtype"], at["shape"])

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, rank: Any) -> Any:
        return self._pieces[rank]

    def look(self) -> None:
        """Find out whether all are still there.

        Raises:
            CheckpointError: Some are gone.
        """
        if len(set(self._nodes)) > 1:
            alive = nodes_alive()
            for rank, node in enumerate(self._nodes):
                if node not in alive:  # another node may have a copy
                    self._fetch(rank)

    def _fetch(self, rank: int) -> Mapping[str, Any]:
        """The bytes of a worker's pieces, by their keys."""
        try:
            pieces: Any = ray.get(self._refs[rank])
        except RayError as error:
            raise self._lost(f"the shards of rank {rank} are gone ({error})") from None
        if isinstance(pieces, Failure):
            raise self._lost(f"rank {rank}'s shards: {pieces.message}")
        found: Mapping[str, Any] = pieces
        return found

    # ---------------------------------------------------------------- writing

    def write(self, new: NewCheckpoint, plans: Mapping[int, PartPlan]) -> dict[int, PartRecord]:
        """See `PiecesElsewhere.write`."""
        by_node: dict[str, list[int]] = {}
        for rank in plans:
            by_node.setdefault(self._nodes[rank], []).append(rank)
        asked = {node: self._ask(node, ranks, new, plans) for node, ranks in by_node.items()}
        records: dict[int, PartRecord] = {}
        try:
            for node, ranks in by_node.items():
                answers = self._answers(asked[node], node, new) or [None] * len(ranks)
                _raise_first([answer for answer in answers if isinstance(answer, CheckpointError)])
                for rank, answer in zip(ranks, answers, strict=True):
                    records[rank] = self._write_here(rank, new, plans[rank]) if answer is None else answer
        finally:
            _end(list(asked.values()))
        return records

    def _ask(self, node: str, ranks: Sequence[int], new: NewCheckpoint, plans: Mapping[int, PartPlan]) -> Any:
        """Have a node write its ranks' files."""
        writer = ray.remote(num_cpus=0, max_retries=0)(write_parts).options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), name="raytrainer-write"
        )
        folder = new.folder
        path = folder.shown if "://" in folder.shown else folder.path
        wanted, refs = [plans[rank] for rank in ranks], [self._refs[rank] for rank in ranks]
        return writer.remote(path, folder.shown, new.marker, changed_environment(), wanted, *refs)

    def _answers(self, asked: Any, node: str, new: NewCheckpoint) -> list[Any] | None:
        """What a node has written; None: it has not."""
        while not ray.wait([asked], timeout=_LOOK)[0]:
            if new.given_up():
                raise GivenUpError(f"{new.folder.shown}: given up before it was written.")
        try:
            answers: list[Any] | None = ray.get(asked)
        except RayError as error:
            log.warning(
                "%s: node %s could not write its part of it, which comes here to be written: %s", new.folder.shown,
                node[:8], str(error).splitlines()[0],
            )  # fmt: skip
            return None
        if answers is None:
            _say_not_shared(new.folder.shown, node)
        return answers

    def _write_here(self, rank: int, new: NewCheckpoint, plan: PartPlan) -> PartRecord:
        data = self._fetch(rank)
        new.folder.delete([plan.name])  # what a process that was killed may have left
        return write_part(new.folder, plan, data, new.given_up)


def _raise_first(errors: Sequence[CheckpointError]) -> None:
    """What has gone wrong, rather than what was given up because of it."""
    for error in sorted(errors, key=lambda error: isinstance(error, GivenUpError)):
        raise error


_told: set[str] = set()


def _say_not_shared(path: str, node: str) -> None:
    """Once for each node, as there may be many checkpoints."""
    if node not in _told:
        _told.add(node)
        log.warning(
            "%s: node %s does not see this folder, so that the shards of its workers travel through this process. "
            "Save to a path that all nodes share, or to a URI.", path, node[:8],
        )  # fmt: skip


def _end(asked: Sequence[Any]) -> None:
    """Have those that still write stop and delete what they have begun."""
    left = ray.wait(list(asked), num_returns=len(asked), timeout=0)[1] if asked else []
    for force in (False, True):
        if left:
            with contextlib.suppress(RayError, ValueError):
                for ref in left:
                    ray.cancel(ref, force=force)
                left = ray.wait(left, num_returns=len(left), timeout=_PATIENCE)[1]
