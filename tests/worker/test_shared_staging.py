"""Shards copied to memory that outlives the worker: each to its slot, adopted by whoever takes its place."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch

from raytrainer.checkpointing.pieces import KEY
from raytrainer.memory_segments import Handed
from raytrainer.worker import shared_staging as module
from raytrainer.worker.actor.holder import Holder
from raytrainer.worker.actor.pieces_apart import PieceInSegment, apart
from raytrainer.worker.shared_staging import SharedStaging
from raytrainer.worker.staging import Staging

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has such memory")
CPU = torch.device("cpu")


def pieces(**tensors: torch.Tensor) -> dict[str, Any]:
    return {key: {"at": (0,) * t.dim(), "shape": tuple(t.shape), "data": t} for key, t in tensors.items()}


def read(handed: Handed, key: str, like: torch.Tensor) -> torch.Tensor:
    return PieceInSegment(handed.bytes_of(key), "this", like.dtype, tuple(like.shape)).read()


A, B, HALF = torch.arange(12.0).view(3, 4), torch.tensor(7), torch.arange(5).bfloat16()


def test_states_of_two_slots_are_apart_and_another_takes_the_place_of_one() -> None:
    staging = SharedStaging(CPU)
    one = staging.copy(0, pieces(a=A, b=B, half=HALF))
    two = staging.copy(1, pieces(a=A + 1, b=B + 1, half=HALF.t()))
    assert one.segment.name != two.segment.name
    assert torch.equal(read(one, "a", A), A) and torch.equal(read(two, "a", A), A + 1)
    assert read(one, "b", B) == 7 and torch.equal(read(two, "half", HALF), HALF)
    kept = read(one, "a", A)
    three = staging.copy(0, pieces(a=A.t().contiguous().t() * 2))  # weights alone have their places
    assert three.segment.name == one.segment.name and three.layout == one.layout
    assert torch.equal(read(three, "a", A), A * 2) and torch.equal(kept, A)  # what was read is the reader's own
    other = staging.copy(0, pieces(a=torch.ones(99)))
    assert other.segment.name != one.segment.name and not one.segment.is_there() and two.segment.is_there()
    staging.close()
    assert not two.segment.is_there() and not other.segment.is_there()


def test_memory_that_does_not_fit_goes_before_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    staging = SharedStaging(CPU)
    staging.copy(0, pieces(a=A))
    former, shared_buffer = weakref.ref(staging._buffers[0]), module.SharedBuffer
    found: list[Any] = []
    monkeypatch.setattr(module, "SharedBuffer", lambda *args: (found.append(former()), shared_buffer(*args))[1])
    staging.copy(0, pieces(a=A, b=B))
    assert found == [None]


def test_the_rest_of_a_state_is_copied_as_ever() -> None:
    staging = Staging(CPU)
    staging.shared = SharedStaging(CPU)
    state = {"own": {"seen": torch.ones(2)}, "epoch": 3, KEY: pieces(a=A)}
    staged = staging.copy(state, 0)
    assert staged.handed is not None and staged["own"]["seen"].data_ptr() != state["own"]["seen"].data_ptr()
    rest, where = apart(staged, staged.handed)
    assert where is staged.handed and rest == {
        "epoch": 3,
        KEY: {"a": {"at": (0, 0), "shape": (3, 4), "dtype": A.dtype}},
    }
    assert "data" in state[KEY]["a"]
    assert staging.copy(state).handed is None


def test_memory_is_taken_beforehand_and_for_another_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread: the copy takes none itself, whenever it comes."""
    made: list[Any] = []
    shared_buffer = module.SharedBuffer
    go_on = threading.Event()

    def counted(*arguments: Any) -> Any:
        assert threading.current_thread().name == "raytrainer-share" and go_on.wait(60)
        made.append(shared_buffer(*arguments))
        return made[-1]

    monkeypatch.setattr(module, "SharedBuffer", counted)
    staging = SharedStaging(CPU)
    staging.reserve(pieces(a=A))
    staging.reserve_like(1, 0)
    staging.reserve_like(1, 0)
    assert made == []  # nobody has waited
    go_on.set()
    names = [staging.copy(slot, pieces(a=A)).segment.name for slot in (0, 1, 0)]
    assert [buffer.segment.name for buffer in made] == names[:2] and names[2] == names[0]


@pytest.fixture
def lost() -> Any:
    """A worker's process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("ends", [True, False])
def test_the_memory_of_a_lost_worker_is_used_again_once_its_process_has_ended(
    lost: Any, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ENDING", 60.0 if ends else 0.0)
    former, holder = SharedStaging(CPU), Holder()
    old = former.copy(0, pieces(a=A))
    (held,) = holder.hold(0, [os.getpid()], old)
    assert held is not None
    former.close()
    staging, kept = SharedStaging(CPU), {0: Handed(held, old.layout)}
    staging.adopt(kept, {lost.pid})
    if ends:
        lost.kill()
        lost.communicate()
    new = staging.copy(0, pieces(a=A + 1))
    assert (new.segment.name == old.segment.name) == ends
    assert torch.equal(read(kept[0], "a", A), A + 1 if ends else A)
    if ends:
        staging.adopt(kept, {os.getpid()})  # its own: nobody is waited for
        assert staging.copy(0, pieces(a=A)).segment.name == old.segment.name
    holder.keep([])


def test_what_is_gone_is_not_adopted() -> None:
    former = SharedStaging(CPU)
    old = former.copy(0, pieces(a=A))
    former.close()
    del former
    gc.collect()
    staging = SharedStaging(CPU)
    staging.adopt({0: old}, ())
    assert staging.copy(0, pieces(a=A)).segment.name != old.segment.name
