"""A worker's process tells where its threads are when SIGUSR1 asks for it, also while one of them holds the GIL.

Processes that its loaders have forked off it inherit both, the handler and the file, and are asked likewise.

The stacks of threads that go on meanwhile may be read while they change, which can end the process. So who only looks
whether it waits, as the driver does in each long wait, has but the main thread write its own, by another signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from raytrainer.plan.where_it_is import BATCH, LOADERS_PROCESS, PROCESSOR, TURNS, WRITTEN
from raytrainer.worker.batch_sign import NONE, put_up_sign, read_sign

__all__ = ["ask", "can_be_asked", "glance"]

#: Seconds without a further line after which a dump is whole; and one that does not end as a main thread's stack does,
#: which comes last: where many compute, a process may be made to wait in the midst of writing it.
QUIET, LONGER = 0.1, 2.0

#: Ends of a dump's last line: the outermost frame, or that there are more than are shown.
_ENDS = (" in <module>\n", "  ...\n")

#: Bytes of dumps that are kept; a run that is slow is looked at often.
_MOST = 2**20

#: Has the main thread write its stack; one that nobody else uses: libraries' own are the first and last of its kind.
_MAIN: int | None = signal.SIGRTMIN + 11 if hasattr(signal, "SIGRTMIN") else None


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
    if _MAIN is not None and signal.getsignal(_MAIN) in (signal.SIG_DFL, None):
        faulthandler.register(_MAIN, file=file, all_threads=False)
    put_up_sign(_sign_beside(path))
    return str(path)


def ask(pid: int, path: str, patience: float) -> str:
    """What the process, and after it its loader's processes, write now; "" where it writes nothing.

    Call it on the process's own machine.
    """
    text = _ask(pid, path, patience, signal.SIGUSR1)
    if text:
        text += _facts(pid, Path(path))
        for loaders in _forks(pid, path):
            text += f"\n{LOADERS_PROCESS} {loaders}\n{_ask(loaders, path, patience, signal.SIGUSR1)}"
    return text


def glance(pid: int, path: str, patience: float) -> str:
    """The same of its main thread alone, which cannot harm a process that goes on; "" where it cannot be asked so."""
    if _MAIN is None or not _hears(Path(f"/proc/{pid}"), _MAIN):
        return ""
    text = _ask(pid, path, patience, _MAIN)
    return text + _facts(pid, Path(path)) if text else ""


def _sign_beside(path: Path) -> Path:
    return path.with_suffix(".batch")


def _facts(pid: int, path: Path) -> str:
    """Lines on which batch a worker is in, and on what it has done in all, as far as that is to be had."""
    batch, lines = read_sign(_sign_beside(path)), ""
    if batch != NONE:
        lines += f"\n{BATCH} {batch}"
    with contextlib.suppress(OSError):
        lines += f"\n{PROCESSOR} {_computed(str(pid)):.2f}"
    for what, file, name in ((WRITTEN, "io", "wchar"), (TURNS, "status", "voluntary_ctxt_switches")):
        with contextlib.suppress(OSError, StopIteration):
            lines += f"\n{what} {_field(Path(f'/proc/{pid}/{file}'), name)}"
    return f"{lines}\n"


def _computed(pid: str) -> float:
    """Seconds for which a process, its children and theirs have computed: a compiler, say, is a child."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds: float = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    for child in _children(pid):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            seconds += _computed(child)
    return seconds


def _children(pid: str) -> list[str]:
    found: list[str] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += children.read_text().split()
    return found


def _field(file: Path, name: str) -> str:
    return next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:")).split()[1]


def _hears(process: Path, number: int) -> bool:
    """Whether a process has a handler of a signal, which ends others."""
    try:
        return bool(int(_field(process / "status", "SigCgt"), 16) >> (number - 1) & 1)
    except (OSError, StopIteration):
        return False


def _ask(pid: int, path: str, patience: float, number: int) -> str:
    file, deadline = Path(path), time.monotonic() + patience
    before = file.stat().st_size
    if before > _MOST:
        os.truncate(file, 0)
        before = 0
    _send(pid, number)
    text, since = "", time.monotonic()
    while (now := time.monotonic()) < deadline:
        if text and now - since >= (QUIET if text.endswith(_ENDS) else LONGER):
            break
        with file.open(errors="replace") as stream:
            stream.seek(before)
            more = stream.read()
        if more != text:
            text, since = more, now
        time.sleep(0.01)
    return text


def _send(pid: int, number: int) -> None:
    """A signal; that for the main thread to it alone: else another one gets it while the main thread has it blocked."""
    send = getattr(ctypes.CDLL(None), "tgkill", None) if number == _MAIN else None  # glibc has it since 2.30
    if send is None or send(pid, pid, number):
        os.kill(pid, number)


def _forks(pid: int, path: str) -> Iterator[int]:
    """Child processes that write to that file, too. Others would die of the signal; none where there is no /proc."""
    for child in _children(str(pid)):
        process = Path("/proc") / child
        try:
            if _hears(process, signal.SIGUSR1) and any(os.readlink(f) == path for f in (process / "fd").iterdir()):
                yield int(child)
        except OSError:  # it has ended meanwhile
            continue
