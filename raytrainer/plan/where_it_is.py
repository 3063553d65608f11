"""Where a process is, from a dump of its threads by `faulthandler`: the user's own line, and what it waits for."""

from __future__ import annotations

import re
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from raytrainer.plan.folding import by_text, ranks_text

__all__ = [
    "BATCH",
    "DRIVER",
    "LOADERS_PROCESS",
    "PROCESSOR",
    "TURNS",
    "WRITTEN",
    "Frame",
    "Silence",
    "Whereabouts",
    "folded",
    "frames_of_threads",
    "keep_waiting",
    "waits_for_workers",
    "whereabouts",
]

_THREAD = re.compile(r"^(Current thread|Thread) 0x[0-9a-f]+|^Stack \(most recent")  # the last: of one that writes alone
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')

#: Begins the line in front of what a process of the worker's loader has written.
LOADERS_PROCESS = "Process of the loader:"

#: Begin lines behind what a worker has written: which batch it is in, for how long it and its children have computed so
#: far, how much it has sent or written, and how often its main thread has begun to wait.
BATCH, PROCESSOR, WRITTEN, TURNS = "In batch", "Seconds of processor time:", "Bytes written:", "Waits begun:"

_OWN = Path(__file__).parents[1].as_posix()
_VERBS = "/worker/worker.py"  # what obeys the driver is called by
_STANDARD = sysconfig.get_path("stdlib")

_BATCH = "a batch from the loader's processes"
DRIVER = "the driver"

#: Seconds without an answer that are worth a word: workers answer about once a second.
_LONG = 3.0

_BACKWARD = "the backward pass, and in it averages over the workers"

#: Waits that have a name: part of the file's path, the function ("" for any), what it is.
_WAITS = (
    ("raytrainer/strategies/group_strategy.py", "", "the other workers"),
    ("raytrainer/strategies/meeting.py", "", "the other workers"),
    ("raytrainer/strategies/skipping.py", "", "the other workers"),
    ("raytrainer/strategies/stop_board.py", "enter", "the other workers"),
    ("raytrainer/strategies/collective_order.py", "", "the other workers"),
    ("torch/distributed/distributed_c10d.py", "", "the collective {function}"),
    ("torch/distributed/nn/functional.py", "", "the collective {function}"),
    ("torch/distributed/_functional_collectives.py", "", "the collective {function}"),
    ("torch/utils/data/dataloader.py", "_try_get_data", _BATCH),
    ("torch/utils/data/dataloader.py", "_get_data", _BATCH),
    ("torch/autograd/graph.py", "_engine_run_backward", _BACKWARD),
    ("torch/cuda/__init__.py", "synchronize", "the GPU"),
    ("torch/cuda/streams.py", "synchronize", "the GPU"),  # a stream or an event
)
#: What such waits are made of, and others: what is made of which comes first.
_PLAIN_WAITS = (
    ("queue.py", "get", "a queue"),
    ("subprocess.py", "", "another program"),
    ("socket.py", "", "the network"),
    ("threading.py", "wait", "another thread"),
    ("threading.py", "join", "another thread"),
)


#: How waits begin that may be for other workers. A GPU waits for them too, and the driver for those that do not answer.
_FOR_WORKERS = ("the collective", "the backward pass", "the other workers")
_FOR_OTHERS = (*_FOR_WORKERS, "the GPU", DRIVER)


@dataclass(frozen=True)
class Frame:
    """One call: file, line, function."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


@dataclass(frozen=True)
class Whereabouts:
    """Where a worker is.

    Attributes:
        rank: Its global rank.
        node: Its node and process.
        user: The innermost line of the user's own code that it is in; None: in none. Where it waits for a process of
            its loader, or for a thread of the backward pass, that one's line.
        innermost: The innermost line of all; None where it did not answer.
        waits_for: What it waits for, where that can be told; "" otherwise.
        threads: The whole dump.
        seconds: For how long the driver has waited for the workers' answer; None where it does not.
        batch: The epoch's batch that it trains on; None where it trains on none, or where that is not known.
        processor: Seconds for which its process and its children have computed so far; None where it is not known.
        written: Bytes that its process has written or sent so far; None likewise.
        turns: How often its main thread has begun to wait for something so far; None likewise.
    """

    rank: int
    node: str
    user: Frame | None
    innermost: Frame | None
    waits_for: str
    threads: str
    seconds: float | None = None
    batch: int | None = None
    processor: float | None = None
    written: float | None = None
    turns: float | None = None

    @property
    def where(self) -> str:
        """The line and what it waits for, in words."""
        if self.innermost is None:
            return "did not answer"
        at = f"at {self.user}" if self.user is not None else f"in no code of yours, at {self.innermost}"
        silent = self.seconds is not None and self.seconds >= _LONG and self.waits_for != DRIVER
        said = f"; no answer for {self.seconds:.0f} s" if silent else ""
        return f"{at}{f', waiting for {self.waits_for}' if self.waits_for else ''}{said}"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}: {self.where}"


class Silence:
    """Entered while the driver waits for answers: `seconds` tells for how long, from any thread."""

    def __init__(self) -> None:
        self._since: float | None = None

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    @property
    def seconds(self) -> float | None:
        since = self._since
        return None if since is None else time.monotonic() - since


def folded(found: Sequence[Whereabouts]) -> list[str]:
    """A line for each place; several ranks at the same one share it, with the node of the first of them."""
    by_rank = {each.rank: each for each in found}
    lines = []
    for ranks, where in by_text({each.rank: each.where for each in found}):
        first = by_rank[ranks[0]]
        lines.append(str(first) if len(ranks) == 1 else f"ranks {ranks_text(ranks)} (first on {first.node}): {where}")
    return lines


def keep_waiting(found: Sequence[Whereabouts]) -> list[int]:
    """The ranks, of workers that do not come to an end, of those that wait for none of the others, as far as one sees.

    Empty: all seem to wait.
    """
    return [each.rank for each in found if not each.waits_for.startswith(_FOR_OTHERS)]


def waits_for_workers(each: Whereabouts) -> bool:
    """Whether it waits for other workers, as far as its calls tell: its backward pass may compute, too."""
    return each.innermost is not None and each.waits_for.startswith(_FOR_WORKERS)


def frames_of_threads(dump: str) -> list[list[Frame]]:
    """The calls of each thread, innermost first."""
    threads: list[list[Frame]] = []
    for line in dump.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif (found := _FRAME.match(line)) and threads:
            threads[-1].append(Frame(found["file"], int(found["line"]), found["function"]))
    return threads


def whereabouts(rank: int, node: str, dump: str, seconds: float | None = None) -> Whereabouts:
    """What a dump says of the thread that trains: the one that this package's worker runs in.

    Args:
        rank: The worker's global rank.
        node: Its node and process.
        dump: What `faulthandler` has written there, followed by that of its loader's processes.
        seconds: See `Whereabouts`.
    """
    own, *loaders = dump.split(LOADERS_PROCESS)
    threads = frames_of_threads(own)
    batch, *done = (_number(own, what) for what in (BATCH, PROCESSOR, WRITTEN, TURNS))
    package = _package(threads)
    training = next((frames for frames in threads if any(_trains(frame, package) for frame in frames)), None)
    if training is None:  # between verbs
        idle = threads[-1][0] if threads and threads[-1] else None
        return Whereabouts(rank, node, None, idle, DRIVER if idle else "", dump, seconds, None, *done)
    inside = training[: next(i for i, frame in enumerate(training) if _trains(frame, package))]
    user = _users(inside, package)
    # what called the user's line, a backward pass its hook, say, is not what that waits for
    waits_for = _wait(inside[: inside.index(user)] if user is not None else inside or training[:1])
    if user is None and waits_for == _BATCH:
        user = next(
            filter(None, (_users(frames, package) for each in loaders for frames in frames_of_threads(each))), None
        )
        waits_for += ", in one of which this line is" if user is not None else ""
    if waits_for == _BACKWARD:
        # hooks of a backward pass on a GPU run in threads of autograd's, which Python has not started
        hooks = [frames for frames in threads if frames is not training and frames[-1:] and not _of_python(frames[-1])]
        hook = next(filter(None, (_users(frames, package) for frames in hooks)), None)
        user, waits_for = (user, waits_for) if hook is None else (hook, "")
    at = None if batch is None else int(batch)
    return Whereabouts(rank, node, user, training[0], waits_for, dump, seconds, at, *done)


def _number(dump: str, what: str) -> float | None:
    found = re.search(rf"^{what} ([0-9.]+)$", dump, re.MULTILINE)
    return None if found is None else float(found[1])


def _package(threads: Sequence[Sequence[Frame]]) -> str:
    """Where this package is installed there: another machine may have it elsewhere."""
    files = (frame.file.replace("\\", "/") for frames in threads for frame in frames)
    return next((file.removesuffix(_VERBS) for file in files if file.endswith("raytrainer" + _VERBS)), _OWN)


def _users(frames: Sequence[Frame], package: str) -> Frame | None:
    return next((frame for frame in frames if _is_users(frame, package)), None)


def _of_python(outermost: Frame) -> bool:
    return outermost.function in ("_bootstrap", "<module>", "_run_code")


def _trains(frame: Frame, package: str) -> bool:
    return frame.file.replace("\\", "/").startswith(f"{package}/worker/")


def _is_users(frame: Frame, package: str) -> bool:
    path = frame.file.replace("\\", "/")
    if frame.file.startswith("<"):  # a cell's name, but not that of frozen imports
        return not frame.file.startswith("<frozen")
    return "/site-packages/" not in path and not path.startswith((package, _STANDARD))


def _wait(frames: Sequence[Frame]) -> str:
    plain = ((frame, wait) for wait, frame in product(_PLAIN_WAITS, frames))
    for frame, (part, function, what) in (*product(frames, _WAITS), *plain):
        if frame.file.replace("\\", "/").endswith(part) and function in ("", frame.function):
            # of torch's collectives the inner one does the work, and the outer one is what was called
            return what.format(function=_called(frames, part) if "{" in what else frame.function)
    return ""


def _called(frames: Sequence[Frame], part: str) -> str:
    names = [f.function for f in frames if f.file.replace("\\", "/").endswith(part) and f.function != "wrapper"]
    return names[-1] if names else "of torch.distributed"
