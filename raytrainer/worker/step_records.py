"""What each worker writes down after each batch, so that no more than the step in progress is lost with one of them.

`plan/common_moment.py` says which of it serves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raytrainer.messages import TrainReport
from raytrainer.metric_messages import MetricReport
from raytrainer.metrics.metric_store import MetricStore
from raytrainer.plan.common_moment import KEPT, KEPT_BEHIND, Moment
from raytrainer.strategies.replicated import ReplicatedStrategy
from raytrainer.tensor_packing import pack, replaced
from raytrainer.worker.process_group import ProcessGroup
from raytrainer.worker.record_memory import RecordMemory
from raytrainer.worker.step_copies import OnTheWay, StepCopies, is_plain
from raytrainer.worker.worker_run import WorkerRun
from raytrainer.worker.worker_state import capture_state

__all__ = ["InCopies", "RecordedMoments", "StepRecords", "asked_for", "begin_records"]

log = logging.getLogger("raytrainer")

#: Bytes of a record that are too many to be written after each step; and by how much a later one may exceed the first.
LARGEST, MORE = 2**22, 2**18

#: Bytes of weights on CPUs from which on each worker's copies cost more than one worker's, which Ray then copies again.
MOST_WEIGHTS = 2**24

#: Of a GPU's memory, and of what is free of it when training begins, the parts that copies may take.
SHARE, SHARE_OF_FREE = 20, 4


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


@dataclass
class _Begun:
    """A moment of which the device is still to do its part.

    Attributes:
        moment: It.
        report: As if the chunk ended there, without metrics.
        content: What the worker has in main memory, pickled.
        travelling: What it has on the device.
        wait: Waits for the device to come to it.
        told: Metrics of its chunk that have been reported to the driver since.
    """

    moment: Moment
    report: TrainReport
    content: bytes
    travelling: OnTheWay
    wait: Callable[[], None]
    told: MetricReport = field(default_factory=MetricReport)


class StepRecords:
    """This worker's side. It outlives the run and the process group, until the next run begins.

    Args:
        memory: For all ranks' records.
        rank: This worker's.
        behind: Whether a moment's record is written with the next one, as a GPU has not come to it yet.
        copies: For what all have alike.
    """

    def __init__(self, memory: RecordMemory, rank: int, behind: bool, copies: StepCopies) -> None:
        self._memory, self._rank, self._behind, self._copies = memory, rank, behind, copies
        self._begun: _Begun | None = None
        self._turn = self._chunk = 0
        self._closed = False
        self.whole = True  # whether each moment so far has been recorded

    def begin_chunk(self, chunk: int) -> bool:
        """The next moments are of this chunk; whether anything may have come between it and the one before."""
        self._chunk = chunk
        return self._begun is None

    def take(self, run: WorkerRun, report: TrainReport) -> None:
        """Record the moment at which a chunk could end with this report, to which its metrics are still to come."""
        metrics = run.view.metrics
        self.finish(metrics)
        if self._memory.stopped and self.whole:
            self._stop()
        if not self.whole or self._closed:
            return
        metrics.begin_report()
        travelling, self._turn = OnTheWay(), self._turn + 1
        live = alike(run)
        content = _content(run, live, travelling if self._behind else None)
        try:
            pickled = _dumps(content)
        except Exception as error:
            self._give_up("What is to be kept of each step cannot be pickled: %s: %s", type(error).__name__, error)
            return
        try:
            travelling.begin()
            there_is_room = self._copies.begin(self._turn, live)
        except torch.OutOfMemoryError:
            there_is_room = False
        if not there_is_room:
            self._give_up("Rank %d has no room for %d copies of weights and optimizer.", self._rank, KEPT_BEHIND)
            return
        wait = _mark() if self._behind and run.strategy.device.type == "cuda" else _nothing
        self._begun = _Begun((self._chunk, report.batches), report, pickled, travelling, wait)
        if not self._behind:
            self.finish(metrics)

    def finish(self, metrics: MetricStore) -> None:
        """Write the record of the moment that was begun last, once the device has come to it."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        begun.wait()
        logged = metrics.finish_report()
        metrics.give_back(logged)
        if self._closed:  # asked after the wait: NCCL's end may have ended that
            return
        begun.told.add(logged)
        report = replace(begun.report, metrics=begun.told.shared() if self._rank else begun.told)
        arrived = begun.travelling.arrived()
        if not begun.travelling.proves(arrived):
            self._give_up("Rank %d writes to a large tensor in an attribute without torch's knowledge.", self._rank)
            return
        record = _dumps((begun.content, pack(arrived), metrics.sums(), report))
        self._copies.complete(self._turn, begun.moment)
        if not self._memory.write(self._rank, self._turn, begun.moment, record):
            self._give_up("Rank %d has %d KB to keep of each step, which is too much.", self._rank, len(record) >> 10)

    def end_chunk(self, metrics: MetricStore, behind: bool) -> MetricReport:
        """What the chunk has to report; `behind`: without its last batch, to which the device has not come yet."""
        if not behind:
            self.finish(metrics)
            return metrics.report()
        logged = metrics.finish_report(left=int(self._begun is not None))
        if self._begun is not None:
            self._begun.told.add(logged)
        return logged

    def close(self) -> None:
        """From now on what the device has done counts no more: collectives are ended before they are complete.

        Called by another thread, before they are.
        """
        self._closed = True

    def moments(self) -> RecordedMoments:
        """What there is."""
        written = [sorted(self._memory.read(rank)) for rank in range(self._memory.size)]
        return RecordedMoments(self._rank, written, self._copies.moments())

    def state(self, moment: Moment) -> tuple[list[bytes], dict[str, Tensor]]:
        """All ranks' records of a moment, and what all have alike."""
        return [self._memory.read(rank)[moment] for rank in range(self._memory.size)], self._copies.of(moment)

    def _give_up(self, message: str, *values: Any) -> None:
        log.warning(message, *values)
        self._memory.stop()
        self._stop()

    def _stop(self) -> None:
        self.whole = False
        self._copies.drop()


def _mark() -> Callable[[], None]:
    event = torch.cuda.Event(blocking=True)
    event.record()
    wait: Callable[[], None] = event.synchronize
    return wait


def _nothing() -> None:
    pass


def asked_for(run: WorkerRun) -> bool:
    """Whether each step is to be recorded; the same on all workers."""
    settings = run.view.settings
    steps = settings.snapshot_every == 1 and type(settings.snapshot_every) is int and settings.max_failures > 0
    whole = isinstance(run.strategy, ReplicatedStrategy) and not settings.accumulates
    return steps and whole and run.task.stage == "fit" and run.attributes is not None


def begin_records(run: WorkerRun, group: ProcessGroup | None) -> StepRecords | None:
    """Where each step is to be recorded, and can be. All workers call it together."""
    if not asked_for(run) or group is None or group.board is None:
        return None
    ranks, length, behind = run.strategy.ranks, 0, _lags(run.strategy.device)
    weights = sum(p.numel() * p.element_size() for p in run.module.parameters())
    kept, room = (KEPT_BEHIND if behind else KEPT), _room(run.strategy.device)
    try:
        length = len(_dumps(_content(run, alike(run), None)))
    except Exception as error:  # what hooks need may come with the first step
        log.debug("What is to be kept of each step is not known yet.", exc_info=error)
    most = torch.tensor([length, -room])
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group.control)
    longest, room = int(most[0]), -int(most[1])
    if longest > LARGEST or (room < kept * weights if behind else weights > MOST_WEIGHTS):
        if length == longest > LARGEST:
            log.info("What rank %d alone has, %d KB, is too much to be kept of each step.", ranks.rank, length >> 10)
        elif behind and ranks.rank == 0:
            log.info("Each step's state is copied to the driver: GPUs have no room for %d copies of it.", kept)
        return None
    each = 2 * longest + MORE
    memory = group.shared_memory(RecordMemory.length(ranks.world_size, kept, each))
    if memory is None:
        return None
    records = RecordMemory(memory, ranks.world_size, kept, each)
    return StepRecords(records, ranks.rank, behind, StepCopies(kept, room))


def _lags(device: torch.device) -> bool:
    """Whether it comes to what it is told later than the worker that tells it."""
    return device.type == "cuda"


def _room(device: torch.device) -> int:
    """Bytes for copies on it."""
    if device.type != "cuda":
        return 2**62
    free, total = torch.cuda.mem_get_info(device)
    return min(total // SHARE, free // SHARE_OF_FREE)


def _dumps(content: Any) -> bytes:
    from raytrainer.worker.actor.module_pickling import dumps  # Ray's, in whose workers this is

    return dumps(content)


def _content(run: WorkerRun, live: dict[str, Tensor], travelling: OnTheWay | None) -> tuple[Any, Any]:
    """What this worker alone has; of rank 0 also what of all workers' state is not in copies, which are of `live`.

    Sums of metrics are not, which are added up once the device has come to what they are of.
    """
    assert run.attributes is not None, "it is not asked for"
    with nullcontext() if travelling is None else travelling.proving(run.attributes.tables):
        state = capture_state(run, weights_only=False, replica=False)
    names = {_place(tensor): name for name, tensor in live.items()}
    device = run.strategy.device.type

    def kept(tensor: Tensor) -> Any:
        if travelling is not None and tensor.device.type == device and is_plain(tensor):
            return travelling.add(tensor)
        return tensor.detach().cpu()

    def recorded(tensor: Tensor) -> Any:
        name = names.get(_place(tensor)) if is_plain(tensor) else None
        return kept(tensor) if name is None else InCopies(name)

    own = state.pop("own")
    del own["metrics"]
    return pack(replaced(own, Tensor, kept)), pack(replaced(state, Tensor, recorded))


def alike(run: WorkerRun) -> dict[str, Tensor]:
    """Weights, and the tensors of optimizers: all workers have the same."""
    found = dict[str, Any](run.module.named_parameters())
    for number, optimizer in enumerate(run.view.optimizers):
        for index, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                for name, value in (optimizer.state.get(parameter) or {}).items():
                    found[f"{number}.{index}.{place}.{name}"] = value
    return {name: tensor for name, tensor in found.items() if is_plain(tensor)}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """The same of tensors that are the same memory, read alike."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
