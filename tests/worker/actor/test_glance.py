"""A look at what a worker does, from beside: it hurts nobody, and sees what the worker's children do."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytrainer.plan.where_it_is import whereabouts
from raytrainer.worker.actor.stack_dump import QUIET, ask, glance

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no /proc here")

BUSY = """
import sys, threading
from pathlib import Path
from raytrainer.worker.actor.stack_dump import can_be_asked

def deep(n):
    # frames that come and go, also as others than before
    return [x * x for x in range(20)] if n == 0 else eval("f(n - 1)", {"f": deep, "n": n})

def busy():
    while True:
        deep(40)

print(can_be_asked(Path(sys.argv[1])), flush=True)
threading.Thread(target=busy, daemon=True).start()
sys.stdin.read()
"""
PARENT = """
import subprocess, sys
from pathlib import Path
from raytrainer.worker.actor.stack_dump import can_be_asked

print(can_be_asked(Path(sys.argv[1])), flush=True)
with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
    sys.stdin.read()
    child.kill()
"""


SLOW = f"""
import signal, sys, time
from pathlib import Path

path = Path(sys.argv[1], "stacks.txt")
path.touch()

def tell(number, frame):
    with path.open("a") as file:
        for line in ("Stack:", '  File "a.py", line 1 in step', '  File "a.py", line 9 in <module>'):
            print(line, file=file, flush=True)
            time.sleep({3 * QUIET})

signal.signal(signal.SIGUSR1, tell)
print(path, flush=True)
sys.stdin.read()
"""
BLOCKED = (
    BUSY.replace("sys.stdin.read()", "")
    + """
import signal
from raytrainer.worker.actor.stack_dump import _MAIN
signal.pthread_sigmask(signal.SIG_BLOCK, [_MAIN])
print("blocked", flush=True)
sys.stdin.readline()
signal.pthread_sigmask(signal.SIG_UNBLOCK, [_MAIN])
sys.stdin.read()
"""
)


@pytest.fixture
def started(tmp_path):
    processes = []

    def start(code):
        command = [sys.executable, "-c", code, str(tmp_path)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1], processes[-1].stdout.readline().strip()

    yield start
    for process in processes:
        process.communicate()


def test_threads_that_go_on_meanwhile(started):
    process, path = started(BUSY)
    # of a few hundred dumps of all threads one ends the process
    said = [glance(process.pid, path, 60.0) for _ in range(30)]
    assert process.poll() is None
    assert all("busy" not in text and "<module>" in text for text in said)


def test_a_process_that_has_to_wait_in_the_midst_of_its_dump(started):
    process, path = started(SLOW)
    for _ in range(2):
        text = ask(process.pid, path, 60.0)
        assert "in step" in text and text.count("<module>") == 1


def test_a_main_thread_that_cannot_hear_yet(started):
    """As while it writes the dump before: no other thread tells of itself instead."""
    process, path = started(BLOCKED)
    assert process.stdout.readline().strip() == "blocked"
    assert "busy" not in glance(process.pid, path, 0.5)
    process.stdin.write("\n")
    process.stdin.flush()
    text = glance(process.pid, path, 60.0)
    assert "busy" not in text and "<module>" in text


def test_what_a_child_computes_counts(started):
    process, path = started(PARENT)
    before, deadline = whereabouts(0, "", glance(process.pid, path, 60.0)), time.monotonic() + 60
    while (now := whereabouts(0, "", glance(process.pid, path, 60.0))).processor < before.processor + 0.2:
        assert time.monotonic() < deadline
    assert now.written >= before.written and now.turns >= before.turns
    assert now.innermost is not None and now.innermost.function in ("read", "<module>")


def test_a_process_that_does_not_listen_is_not_asked(tmp_path):
    with subprocess.Popen(["sleep", "600"]) as process:
        assert glance(process.pid, str(tmp_path / "none"), 1.0) == ""
        assert process.poll() is None
        process.kill()
