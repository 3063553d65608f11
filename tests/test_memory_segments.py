"""Memory that outlives the process that fills it, and how much of it there could be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytrainer import memory_segments
from raytrainer.memory_segments import (
    ALIGNED,
    PIECE,
    Handed,
    Segment,
    SegmentBytes,
    available_memory,
    lay_out,
    new_segment,
)
from raytrainer.worker.actor.holder import Holder

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has such memory")
GIB = 2**30

#: Fills a segment, tells its name and place, and waits to be killed.
WRITER = """
import os, sys
from raytrainer.memory_segments import new_segment
number, segment = new_segment(10_000)
os.pwrite(number, bytes(range(250)) * 40, 0)
print(segment.name, *segment.places[0], flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_has_written_is_there_while_somebody_holds_it() -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER], stdin=-1, stdout=-1, text=True)
    assert writer.stdout is not None
    name, *place = writer.stdout.readline().split()
    pid, number = map(int, place)
    segment = Segment(name, 10_000, ((pid, number),))
    layout = lay_out({"a": 3, "b": 5000})
    holder = Holder()
    assert holder.probe(segment) is None
    found, elsewhere = holder.hold(0, [pid, pid], Handed(segment, layout), Handed(Segment("no", 3, ()), layout))
    assert found is not None and elsewhere is None
    searched = Segment(name, 10_000, ((pid, None),))  # which of its files it is, is not known
    assert searched.is_there()
    writer.kill()
    writer.communicate()
    assert not segment.is_there() and not searched.is_there() and found.is_there()
    some = Handed(found, layout).bytes_of("b")
    assert (some.begin, some.size) == (ALIGNED, 5000)
    content = (bytes(range(250)) * 40)[512:5512]
    assert bytes(some()) == content == bytes(some.copied())
    assert not SegmentBytes(found, 0, 0)()
    for name_again in (found, None):
        handed = [Handed(found, layout)] if name_again else []
        holder.hold(0, [pid] * len(handed), *handed)
        assert found.is_there() == bool(name_again)
    with pytest.raises(OSError):
        some()


def test_another_file_is_not_taken_for_a_segment() -> None:
    number, segment = new_segment(100)
    same_place, same_size = new_segment(100)
    try:
        assert segment.is_there()
        os.dup2(same_place, number)
        assert not segment.is_there()
        assert not Segment(segment.name, 100, ((os.getpid(), None), (2**30, 5))).is_there()
        assert not Segment(same_size.name, 101, same_size.places).is_there()
    finally:
        os.close(number)
        os.close(same_place)


def test_pieces_lie_in_stretches_of_their_own_pages() -> None:
    sizes = {"a": 1, "large": PIECE + 5, "none": 0, "b": 700, "most": PIECE - 1024, "c": 1}
    layout = lay_out(sizes)
    ends = 0
    for stretch in layout.stretches:
        assert stretch.begin % 4096 == 0 and stretch.begin >= ends
        ends = stretch.begin + stretch.size
    assert layout.size == ends and all(0 < stretch.size <= PIECE for stretch in layout.stretches)
    free = 0
    for begin, size in layout.at.values():
        assert begin >= free and begin % ALIGNED == 0
        free = begin + size
        inside = [s for s in layout.stretches if s.begin <= begin and begin + size <= s.begin + s.size]
        whole = [s.begin for s in layout.stretches if begin <= s.begin < begin + size]
        assert inside or not size or (size > PIECE and whole == list(range(begin, begin + size, PIECE)))
    assert layout.fits({"b": 700, "a": 1}) and not layout.fits({"b": 701}) and not layout.fits({"d": 1})
    assert lay_out({}).size == 0


MEMINFO = "MemTotal: 100 kB\nMemAvailable: 60 kB\nHugePages_Total: 0\n".replace(" kB", f"{'0' * 6} kB")
V2 = {"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "max", "/sys/fs/cgroup/a/memory.max": "5000"}
USED = {"/sys/fs/cgroup/a/memory.current": "3000", "/sys/fs/cgroup/a/memory.stat": "anon 7\ninactive_file 500\n"}
V1 = {"/proc/self/cgroup": "4:cpu:/x\n3:memory:/\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "900"}
USED_1 = {
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": "200",
    "/sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"/proc/meminfo": MEMINFO}, (60_000_000 << 10, 100_000_000 << 10)),
        ({"/proc/meminfo": MEMINFO, **V2}, (60_000_000 << 10, 100_000_000 << 10)),  # nobody says what is used
        ({"/proc/meminfo": MEMINFO, **V2, **USED}, (2500, 5000)),
        ({"/proc/meminfo": MEMINFO, **V1, **USED_1}, (800, 900)),
        ({**V2, **USED}, (2500, 5000)),
    ],
)
def test_how_much_memory_could_be_had(files: dict[str, str], expected: tuple[int, int] | None) -> None:
    def read(path: str) -> str:
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    assert available_memory(read) == expected


@pytest.mark.parametrize("available", [(100, 1000), (199, 1000), (201, 1000), None])
def test_how_much_is_room(available: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_segments, "available_memory", lambda: available)
    assert memory_segments.has_room(100) == (available == (201, 1000))


def test_this_machine_tells() -> None:
    found = available_memory()
    assert found is not None and 0 < found[0] <= found[1]
    assert Path("/proc/meminfo").exists()
