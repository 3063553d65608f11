"""What each worker writes down after each batch, so that no more than the step in progress is lost with one of them.

`plan/common_moment.py` says which of it serves.
"""

from __future__ import annotations

import logging
import mmap
import struct
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from xxhash import xxh3_64

from raytrainer.messages import TrainReport
from raytrainer.plan.common_moment import Moment
from raytrainer.strategies.replicated import ReplicatedStrategy
from raytrainer.tensor_packing import pack, replaced
from raytrainer.worker.process_group import ProcessGroup
from raytrainer.worker.worker_run import WorkerRun
from raytrainer.worker.worker_state import capture_state

__all__ = ["InCopies", "RecordedMoments", "StepRecords", "asked_for", "begin_records"]

log = logging.getLogger("raytrainer")

#: Bytes of a record that are too many to be written after each step; and by how much a later one may exceed the first.
LARGEST, MORE = 2**22, 2**18

#: Bytes of weights from which on each worker's copies cost as much as one worker's, which Ray then copies again.
MOST_WEIGHTS = 2**24

#: Before a record: its checksum, the chunk, batches done in it, and its length.
_HEAD = struct.Struct("<Qqqq")

#: Of a rank's records the last two are kept, in turn.
_KEPT = 2


@dataclass(frozen=True)
class InCopies:
    """Stands in a state for a tensor that all workers have alike, by the name that all know it by."""

    name: str


@dataclass(frozen=True)
class RecordedMoments:
    """What a worker that is left can tell.

    Attributes:
        rank: Its rank in the group that has lost workers.
        written: By rank, the moments of which there are whole records.
        copied: Those of which this worker has weights and optimizer.
    """

    rank: int
    written: list[list[Moment]]
    copied: list[Moment]


class Records:
    """The records of all ranks, in memory that they share.

    Args:
        memory: It.
        size: How many ranks.
        room: Bytes for one record.
    """

    def __init__(self, memory: mmap.mmap, size: int, room: int) -> None:
        self._memory, self._size, self._room = memoryview(memory), size, room

    @staticmethod
    def length(size: int, room: int) -> int:
        """Bytes of memory for them."""
        return size * _KEPT * (_HEAD.size + room)

    def _place(self, rank: int, turn: int) -> int:
        return (rank * _KEPT + turn % _KEPT) * (_HEAD.size + self._room)

    def write(self, rank: int, turn: int, moment: Moment, record: bytes) -> bool:
        """Whether there is room for it. Half of a record, or of a head, has another checksum."""
        if len(record) > self._room:
            return False
        at = self._place(rank, turn)
        self._memory[at + _HEAD.size : at + _HEAD.size + len(record)] = record
        self._memory[at : at + _HEAD.size] = _HEAD.pack(_checksum(moment, record), *moment, len(record))
        return True

    def read(self, rank: int) -> dict[Moment, bytes]:
        """The whole ones of a rank."""
        found = {}
        for turn in range(_KEPT):
            at = self._place(rank, turn)
            checksum, chunk, batches, length = _HEAD.unpack(self._memory[at : at + _HEAD.size])
            if 0 < length <= self._room:
                record = bytes(self._memory[at + _HEAD.size : at + _HEAD.size + length])
                if checksum == _checksum((chunk, batches), record):
                    found[chunk, batches] = record
        return found


def _checksum(moment: Moment, record: bytes) -> int:
    digest = xxh3_64(_HEAD.pack(0, *moment, len(record)))
    digest.update(record)
    return digest.intdigest()


class _Copies:
    """Tensors as they were at one moment."""

    def __init__(self) -> None:
        self.moment: Moment | None = None
        self.tensors: dict[str, Tensor] = {}

    def take(self, moment: Moment, live: dict[str, Tensor]) -> None:
        self.moment = None  # what fails midway is of no moment
        if [_kind(t) for t in self.tensors.values()] != [_kind(t) for t in live.values()] or [*live] != [*self.tensors]:
            self.tensors = {name: torch.empty_like(tensor, requires_grad=False) for name, tensor in live.items()}
        for name, tensor in live.items():
            self.tensors[name].copy_(tensor.detach())
        self.moment = moment


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.device


class StepRecords:
    """This worker's side. It outlives the run and the process group, until the next run begins.

    Args:
        records: Of all ranks.
        rank: This worker's.
        size: How many there are.
    """

    def __init__(self, records: Records, rank: int, size: int) -> None:
        self._records, self._rank, self._size = records, rank, size
        self._copies = [_Copies() for _ in range(_KEPT)]
        self._turn = 0
        self.chunk = 0
        self.whole = True  # whether each moment so far has been recorded

    def take(self, run: WorkerRun, report: TrainReport) -> None:
        """Record the moment at which a chunk could end with this report, whose values the next one will have too."""
        run.view.metrics.give_back(report.metrics)
        if not self.whole:
            return
        moment, self.whole = (self.chunk, report.batches), False
        content = _content(run, report)
        try:
            record = _dumps(content)
        except Exception as error:
            log.warning("What is to be kept of each step cannot be pickled: %s: %s", type(error).__name__, error)
            return
        self._turn += 1
        self._copies[self._turn % _KEPT].take(moment, alike(run))
        self.whole = self._records.write(self._rank, self._turn, moment, record)
        if not self.whole:
            log.warning("Rank %d has %d KB to keep of each step, which is too much.", self._rank, len(record) >> 10)

    def moments(self) -> RecordedMoments:
        """What there is."""
        written = [sorted(self._records.read(rank)) for rank in range(self._size)]
        return RecordedMoments(self._rank, written, [c.moment for c in self._copies if c.moment is not None])

    def state(self, moment: Moment) -> tuple[list[bytes], dict[str, Tensor]]:
        """All ranks' records of a moment, and what all have alike."""
        copies = next(copies for copies in self._copies if copies.moment == moment)
        records = [self._records.read(rank)[moment] for rank in range(self._size)]
        return records, {name: tensor.cpu() for name, tensor in copies.tensors.items()}


def asked_for(run: WorkerRun) -> bool:
    """Whether each step is to be recorded; the same on all workers."""
    settings = run.view.settings
    steps = settings.snapshot_every == 1 and type(settings.snapshot_every) is int and settings.max_failures > 0
    whole = isinstance(run.strategy, ReplicatedStrategy) and not settings.accumulates
    whole &= run.strategy.device.type == "cpu"  # a GPU may have no room for two more copies of weights and optimizer
    whole &= sum(p.numel() * p.element_size() for p in run.module.parameters()) <= MOST_WEIGHTS
    return steps and whole and run.task.stage == "fit" and run.attributes is not None


def begin_records(run: WorkerRun, group: ProcessGroup | None) -> StepRecords | None:
    """Where each step is to be recorded, and can be. All workers call it together."""
    if not asked_for(run) or group is None or group.board is None:
        return None
    ranks, length = run.strategy.ranks, 0
    nothing = TrainReport(0, 0, 0, 0.0, False, False, 0.0, run.view.metrics.report())
    run.view.metrics.give_back(nothing.metrics)
    try:
        length = len(_dumps(_content(run, nothing)))
    except Exception as error:  # what hooks need may come with the first step
        log.debug("What is to be kept of each step is not known yet.", exc_info=error)
    most = torch.tensor(length)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group.control)
    if most > LARGEST:
        if length > LARGEST:
            log.info("What rank %d alone has, %d KB, is too much to be kept of each step.", ranks.rank, length >> 10)
        return None
    room = 2 * int(most) + MORE
    memory = group.shared_memory(Records.length(ranks.world_size, room))
    if memory is None:
        return None
    return StepRecords(Records(memory, ranks.world_size, room), ranks.rank, ranks.world_size)


def _dumps(content: Any) -> bytes:
    from raytrainer.worker.actor.module_pickling import dumps  # Ray's, in whose workers this is

    return dumps(content)


def _content(run: WorkerRun, report: TrainReport) -> tuple[Any, Any, TrainReport]:
    """What this worker alone has, with its report; rank 0's also says what of all workers' state is not in copies."""
    state = capture_state(run, weights_only=False, replica=False)
    names = {_place(tensor): name for name, tensor in alike(run).items()}

    def recorded(tensor: Tensor) -> Any:
        name = names.get(_place(tensor)) if _is_plain(tensor) else None
        return tensor.detach().cpu() if name is None else InCopies(name)

    own, common = state.pop("own"), replaced(state, Tensor, recorded)
    own = replaced(own, Tensor, lambda tensor: tensor.detach().cpu())
    if run.strategy.ranks.rank:
        report = replace(report, metrics=replace(report.metrics).shared())
    return pack(own), pack(common), report


def alike(run: WorkerRun) -> dict[str, Tensor]:
    """Weights, and the tensors of optimizers: all workers have the same."""
    found = dict[str, Any](run.module.named_parameters())
    for number, optimizer in enumerate(run.view.optimizers):
        for index, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                for name, value in (optimizer.state.get(parameter) or {}).items():
                    found[f"{number}.{index}.{place}.{name}"] = value
    return {name: tensor for name, tensor in found.items() if _is_plain(tensor)}


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor of a place and strides, and no more than that."""
    return type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and value.numel() > 0


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """The same of tensors that are the same memory, read alike."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
