"""Memory that a worker keeps, by the system's own count of page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from raytrainer.worker import process_memory as heap

COUNT = """
import ctypes, resource, runpy, sys
sys.modules["torch"] = sys
keep_heap = runpy.run_path(sys.argv[1])["keep_heap"]  # which needs no torch; that has done its own with the heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if "keep" in sys.argv:
    keep_heap()
def step():
    blocks = [libc.malloc(1 << 20) for _ in range(40)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 20)
    for block in blocks:
        libc.free(block)
for _ in range(2):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 3)
"""


def faults(*arguments: str, **environment: str) -> float:
    command = [sys.executable, "-c", COUNT, heap.__file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_memory_of_one_step_serves_the_next() -> None:
    assert faults() > 5000  # 40 MiB in pages of 4 KiB
    assert faults("keep") < 50
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072") > 5000  # who has said otherwise is obeyed
