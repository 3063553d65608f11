"""Shards in memory segments, and the process that holds them: read, written, lost; without workers."""

from __future__ import annotations

import contextlib
import gc
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray_models import eventually

from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint
from raytrainer.checkpointing.new_checkpoint import NewCheckpoint
from raytrainer.checkpointing.piece_files import brought_along
from raytrainer.checkpointing.pieces import KEY, Mark, brought_here, whole_state
from raytrainer.driver.workers import ray_parts
from raytrainer.driver.workers.ray_answers import Answers
from raytrainer.driver.workers.ray_captures import RayCaptures
from raytrainer.driver.workers.ray_segments import WEIGHTS, Generations, Lease
from raytrainer.driver.workers.ray_shared_pieces import PiecesInSegments
from raytrainer.errors import CheckpointError, StorageError
from raytrainer.memory_segments import Segment
from raytrainer.worker.shared_staging import SharedStaging

WHOLE = {"state_dict/weight": torch.arange(40.0).view(8, 5), "state_dict/half": torch.arange(6).view(6, 1).bfloat16()}


class Ranks:
    """Two workers' memory, in this process."""

    def __init__(self) -> None:
        self.staging = [SharedStaging(torch.device("cpu")) for _ in range(2)]
        self.generations = Generations(ray.get_runtime_context().get_node_id(), [os.getpid()] * 2)
        self.layouts: list[dict[str, Any]] = []

    def copy(self, slot: int, factor: float = 1.0) -> Lease:
        handed, self.layouts = [], []
        for rank, staging in enumerate(self.staging):
            pieces: dict[str, Any] = {}
            for key, whole in WHOLE.items():
                rows = len(whole) // 2
                block = whole[rank * rows : (rank + 1) * rows] * factor
                pieces[key] = {"at": (rank * rows, 0), "shape": tuple(block.shape), "data": block}
            pieces["state_dict/none"] = {"at": (0,), "shape": (0,), "data": torch.empty(0)}
            handed.append(ray.put(staging.copy(slot, pieces)))
            self.layouts.append(
                {key: {"at": p["at"], "shape": p["shape"], "dtype": p["data"].dtype} for key, p in pieces.items()}
            )
        return self.generations.lease(slot, handed, full=slot != WEIGHTS)

    def die(self) -> None:
        for staging in self.staging:
            staging.close()

    def state(self, lease: Lease) -> dict[str, Any]:
        tree = {key.split("/")[1]: Mark(key, tuple(whole.shape), whole.dtype) for key, whole in WHOLE.items()}
        pieces = PiecesInSegments(self.layouts, lease, StorageError)
        pieces.look()
        return {"epoch": 1, "global_step": 2, "state_dict": tree, KEY: pieces}


@pytest.fixture
def ranks(ray_session: str) -> Any:
    made = Ranks()
    yield made
    made.die()


def is_whole(state: dict[str, Any], factor: float = 1.0) -> bool:
    return all(torch.equal(state["state_dict"][key.split("/")[1]], whole * factor) for key, whole in WHOLE.items())


def test_what_dead_workers_have_had_is_read_and_written(ranks: Ranks, tmp_path: Path) -> None:
    lease = ranks.copy(0)
    state = ranks.state(lease)  # which knows that the holder has it
    ranks.die()
    write_checkpoint(tmp_path / "a.ckpt", state)
    assert is_whole(read_checkpoint(tmp_path / "a.ckpt"))
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "a.ckpt").iterdir())
    assert names == ["meta.json", "pieces", "rank0", "rank1", "state"]
    assert is_whole(ray.get(ray.remote(num_cpus=0)(whole_state).remote(brought_along(state, []))))
    assert torch.equal(brought_here(state)[KEY][1]["state_dict/weight"]["data"], WHOLE["state_dict/weight"][4:])


def test_another_machine_asks_the_node(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(self: Segment) -> int:
        raise FileNotFoundError("there is no such process here")

    state = ranks.state(ranks.copy(0))
    monkeypatch.setattr(Segment, "open", elsewhere)
    state[KEY].look()
    assert is_whole(whole_state(state))
    monkeypatch.setattr(NewCheckpoint, "marker", "elsewhere.json")
    monkeypatch.setattr(ray_parts, "_told", set())
    write_checkpoint(tmp_path / "a.ckpt", state)  # of which the node does not see the folder
    assert is_whole(read_checkpoint(tmp_path / "a.ckpt"))


def test_what_is_gone_is_told(ranks: Ranks, tmp_path: Path) -> None:
    lease = ranks.copy(0)
    state = ranks.state(lease)
    ranks.die()
    ranks.generations.retire()
    assert ranks.state(lease)  # it is needed
    ray.kill(ranks.generations._holder)
    ranks.generations._holder = None
    eventually(lambda: not any(each.segment.is_there() for each in state[KEY]._handed), "the holder ends")
    with pytest.raises(StorageError, match="gone with the processes"):
        write_checkpoint(tmp_path / "a.ckpt", state)
    with pytest.raises(CheckpointError):
        whole_state(state)
    assert not list(tmp_path.rglob("*"))


def test_slots_are_used_again_once_nobody_needs_them(ranks: Ranks) -> None:
    generations = ranks.generations
    one = ranks.copy(generations.take(False), 1.0)
    assert generations.settle() and generations.count == 2 and one.complete()
    two = ranks.copy(generations.take(False), 2.0)
    assert {one.slot, two.slot} == {0, 1} and generations.free(False) is None and not generations.room(True).free
    assert is_whole(whole_state(ranks.state(one))) and is_whole(whole_state(ranks.state(two)), 2.0)
    three = ranks.copy(generations.take(False), 3.0)
    assert three.slot == 2 and is_whole(whole_state(ranks.state(one)))  # what is needed is left alone
    del one
    assert generations.room(False).free and generations.take(True) == 0


def test_where_there_is_room_for_one_state(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    generations = ranks.generations
    first = ranks.copy(0)
    assert generations.is_held(0, 60)
    refs = generations._handed[0]
    refs[1] = ray.put(replace(ray.get(refs[1]), room=False))  # as one says that has looked last
    assert generations.settle() and generations.count == 1
    assert generations.room(False).single and not generations.room(False).free
    weights = generations.room(True)
    assert weights.free and not weights.single and generations.take(True) == WEIGHTS
    del first
    assert generations.take(False) == 0


def test_what_is_written_stays_where_no_process_can_hold_it(ranks: Ranks, tmp_path: Path) -> None:
    """As where each that is to hold it is killed: workers keep it until it is written, and share no more."""

    class Worker:
        def __init__(self, staging: SharedStaging) -> None:
            self.unshare_memory = SimpleNamespace(remote=lambda: ray.put(staging.close()))

    group: Any = SimpleNamespace(broken=False, hang_timeout=60.0)
    places: Any = [SimpleNamespace(node_id=ranks.generations.node, pid=os.getpid())] * 2
    actors = [Worker(staging) for staging in ranks.staging]
    captures = RayCaptures(group, actors, Answers(group), True, places)
    captures.begin(sharded=True, recovers=False)
    captures._generations = generations = ranks.generations
    lease = ranks.copy(0)
    state = ranks.state(lease)
    holder = generations._holding()
    generations._holding = lambda: holder  # type: ignore[method-assign]  # who takes its place is killed, too
    ray.kill(holder)
    other = ranks.copy(1, 2.0)
    room = captures.room(False)
    assert room.single and not room.free
    write_checkpoint(tmp_path / "a.ckpt", state)
    assert is_whole(read_checkpoint(tmp_path / "a.ckpt"))
    segments = [each.segment for each in state[KEY]._handed]
    del lease, state, other
    assert captures.room(False).free and not any(segment.is_there() for segment in segments)


def test_the_last_that_is_needed_goes_with_who_needs_it(ranks: Ranks) -> None:
    """However long the group lives that has made it, as one that has grown may."""
    lease, other = ranks.copy(0), ranks.copy(1)
    segments = [ranks.generations.handed(each.slot)[0].segment for each in (lease, other)]
    ranks.die()
    del other
    ranks.generations.retire()
    eventually(lambda: not segments[1].is_there(), "what nobody needs is given back")
    assert segments[0].is_there()
    del lease
    eventually(lambda: not segments[0].is_there(), "the holder has ended")


def test_what_workers_let_go_of_at_once_is_held_before(ranks: Ranks) -> None:
    """As at a run's end, however late the holder starts."""
    lease = ranks.copy(0)
    ranks.generations.retire()
    ranks.die()
    assert is_whole(whole_state(ranks.state(lease)))


def test_an_ended_group_keeps_no_memory_that_nobody_needs(ranks: Ranks) -> None:
    """As where a run goes on from a file, though the group, or an error's traceback, is still known."""
    lease = ranks.copy(0)
    assert ranks.generations.settle()
    segments = [each.segment for each in ranks.generations.handed(0)]
    ranks.generations.leave()
    assert ranks.generations.continued([os.getpid()] * 2) == set()
    del lease  # another group goes on with them
    assert ranks.generations._holder is not None
    lease = ranks.copy(0)
    assert ranks.generations.settle()
    ranks.die()
    ranks.generations.leave()
    assert all(segment.is_there() for segment in segments)
    del lease
    eventually(lambda: not any(segment.is_there() for segment in segments), "the holder has ended")


def test_errors_that_know_each_other_keep_no_slot(ranks: Ranks) -> None:
    """As of a file that could not be written."""

    def fail(lease: Lease) -> None:
        error = OSError("no space left")
        raise error

    leases = [ranks.copy(0), ranks.copy(1)]
    gc.disable()
    try:
        with contextlib.suppress(OSError):
            fail(leases.pop())
        assert ranks.generations.free(False) is None
        assert ranks.generations.take(False) == 1
    finally:
        gc.enable()


def test_another_holder_takes_the_place_of_one_that_has_ended(ranks: Ranks) -> None:
    generations = ranks.generations
    lease = ranks.copy(0)
    assert generations.settle()
    ray.kill(generations._holder)
    other = ranks.copy(1, 2.0)
    assert generations.settle() and other.complete() and lease.complete()
    states = ranks.state(lease), ranks.state(other)
    ranks.die()
    assert is_whole(whole_state(states[0])) and is_whole(whole_state(states[1]), 2.0)
