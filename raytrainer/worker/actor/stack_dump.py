"""A worker's process tells where its threads are when SIGUSR1 asks for it, also while one of them holds the GIL.

Processes that its loaders have forked off it inherit both, the handler and the file, and are asked likewise.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from raytrainer.plan.where_it_is import BATCH, LOADERS_PROCESS, PROCESSOR
from raytrainer.worker.batch_sign import NONE, put_up_sign, read_sign

__all__ = ["ask", "can_be_asked"]

#: Seconds without a further line after which a dump is whole.
QUIET = 0.1

#: Bytes of dumps that are kept; a run that is slow is looked at often.
_MOST = 2**20


def can_be_asked(folder: Path) -> str | None:
    """Have this process write its threads' stacks to a file in `folder` whenever it gets SIGUSR1; returns the path.

    None where the system has no such signal, or somebody else has a use for it.
    """
    asked = getattr(signal, "SIGUSR1", None)
    if asked is None or signal.getsignal(asked) not in (signal.SIG_DFL, None):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"stacks-{os.getpid()}.txt"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    faulthandler.register(asked, file=file, all_threads=True)  # written by C code, which needs no GIL
    put_up_sign(_sign_beside(path))
    return str(path)


def ask(pid: int, path: str, patience: float) -> str:
    """What the process, and after it its loader's processes, write now; "" where it writes nothing.

    Call it on the process's own machine.
    """
    text = _ask(pid, path, patience)
    if text:
        text += _facts(pid, Path(path))
        for loaders in _forks(pid, path):
            text += f"\n{LOADERS_PROCESS} {loaders}\n{_ask(loaders, path, patience)}"
    return text


def _sign_beside(path: Path) -> Path:
    return path.with_suffix(".batch")


def _facts(pid: int, path: Path) -> str:
    """Lines on which batch a worker is in, and for how long it has computed in all, as far as that is to be had."""
    batch, lines = read_sign(_sign_beside(path)), ""
    if batch != NONE:
        lines += f"\n{BATCH} {batch}"
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        lines += f"\n{PROCESSOR} {(int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK'):.2f}"
    return f"{lines}\n"


def _ask(pid: int, path: str, patience: float) -> str:
    file, deadline = Path(path), time.monotonic() + patience
    before = file.stat().st_size
    if before > _MOST:
        os.truncate(file, 0)
        before = 0
    os.kill(pid, signal.SIGUSR1)
    seen, since = before, time.monotonic()
    while time.monotonic() < deadline and (seen == before or time.monotonic() - since < QUIET):
        size = file.stat().st_size
        if size != seen:
            seen, since = size, time.monotonic()
        time.sleep(0.01)
    with file.open() as stream:
        stream.seek(before)
        return stream.read()


def _forks(pid: int, path: str) -> Iterator[int]:
    """Child processes that write to that file, too. Others would die of the signal; none where there is no /proc."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            process = Path("/proc") / child
            try:
                caught = next(line for line in (process / "status").read_text().splitlines() if line[:7] == "SigCgt:")
                hears = int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1
                if hears and any(os.readlink(file) == path for file in (process / "fd").iterdir()):
                    yield int(child)
            except (OSError, StopIteration):  # it has ended meanwhile
                continue
