"""How `ProgressBar` shows things: live bars by rich, plain lines, and (in `_notebook`) one output of a cell."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from raytrainer.callbacks._notebook import NotebookDisplay
from raytrainer.callbacks._numbers import format_metrics, format_value

__all__ = ["Display", "PlainDisplay", "RichDisplay", "is_live", "make_display"]

HEARTBEAT_SECONDS = 30.0


class Display(Protocol):
    """Shows a few counts side by side; `key` says which."""

    def start(self, key: str, label: str, total: int | None) -> None:
        """Begin to count to `total` (None: unknown)."""

    def update(self, key: str, done: int, metrics: Mapping[str, Any]) -> None:
        """Batches done so far, and the newest metrics."""

    def end(self, key: str, done: int, metrics: Mapping[str, Any], say: bool) -> None:
        """The count is over; `say` leaves a lasting trace of it where others would vanish."""

    def close(self) -> None:
        """Give the terminal back; may be called twice."""


def is_live(console: Console) -> bool:
    """Whether bars can be redrawn in place.

    Asks the file itself: rich takes FORCE_COLOR, which batch systems set, for a terminal.
    """
    return console.file.isatty() and not console.is_dumb_terminal


def make_display(refresh_rate: float, leave: bool | None) -> Display:
    """One output that is redrawn in a notebook, live bars where stdout allows them, otherwise plain lines."""
    console = Console()
    if console.is_jupyter:
        return NotebookDisplay(refresh_rate, leave)
    return RichDisplay(console, refresh_rate, bool(leave)) if is_live(console) else PlainDisplay()


def count_text(task: Task) -> str:
    """ "12/240", or "12" when the total is unknown."""
    return f"{int(task.completed)}" + ("" if task.total is None else f"/{int(task.total)}")


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(count_text(task), style="progress.download", no_wrap=True)


class _Speed(ProgressColumn):
    """Batches per second, or seconds per batch when that is below one."""

    def render(self, task: Task) -> Text:
        # rich's own speed needs two reports; before that, and when a total is set afterwards, the average serves
        speed = task.finished_speed or task.speed or (task.completed / task.elapsed if task.elapsed else 0)
        text = "-- it/s" if not speed else f"{speed:.1f} it/s" if speed >= 1 else f"{1 / speed:.1f} s/it"
        return Text(text, style="progress.data.speed", no_wrap=True)


class _Bars(Progress):
    """Bars that fit the terminal: what it is too narrow for goes, and metrics take lines of their own, whole ones."""

    #: Columns that a line needs for all parts of a bar, and for all but the spinner and the time to come.
    WHOLE, SHORT = 78, 56

    def __init__(self, console: Console, refresh_per_second: float) -> None:
        self._drawn_on = console
        self._labels, self._counts = Column(no_wrap=True), Column(no_wrap=True, justify="right")
        label, count = TextColumn("{task.description}", table_column=self._labels), _Count(self._counts)
        time_left = TextColumn("<", style="dim"), TimeRemainingColumn()
        self._whole = label, SpinnerColumn(), BarColumn(20), count, TimeElapsedColumn(), *time_left, _Speed()
        self._short = label, BarColumn(10), count, TimeElapsedColumn(), _Speed()
        self._bare = label, count
        super().__init__(*self._whole, console=console, refresh_per_second=refresh_per_second)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Each bar, and below it its metrics, unless there is room beside it."""
        console = self._drawn_on
        width = console.width
        self.columns = self._whole if width >= self.WHOLE else self._short if width >= self.SHORT else self._bare
        for column, texts in (
            (self._labels, [task.description for task in self.tasks]),
            (self._counts, [count_text(task) for task in self.tasks]),
        ):
            column.min_width = max(map(len, texts), default=0)  # so that bars stand below each other
        for task in self.tasks:
            bar, metrics = self.make_tasks_table([task]), [Text(part) for part in task.fields["metrics"]]
            beside = Table.grid(padding=(0, 2))
            beside.add_row(bar, Text(" ").join(metrics))
            if not metrics:
                yield bar
            elif Measurement.get(console, console.options.update(width=10_000), beside).maximum <= width:
                yield beside
            else:
                yield bar
                yield Padding(Columns(metrics, padding=(0, 2)), (0, 0, 0, 2))


class RichDisplay:
    """Live bars.

    Args:
        console: Where to draw.
        refresh_rate: Seconds between redraws.
        leave: Keep the bars of earlier epochs.
    """

    def __init__(self, console: Console, refresh_rate: float, leave: bool) -> None:
        self._console, self._leave = console, leave
        self._progress = _Bars(console, 1 / refresh_rate)
        self._tasks: dict[str, TaskID] = {}

    def start(self, key: str, label: str, total: int | None) -> None:
        """Add a bar; the first one starts the live display."""
        self._remove(key)
        self._progress.start()
        self._tasks[key] = self._progress.add_task(label, total=total, metrics=[])

    def update(self, key: str, done: int, metrics: Mapping[str, Any]) -> None:
        """Move a bar."""
        if key in self._tasks:
            shown = [f"{name}={format_value(value)}" for name, value in metrics.items()]
            self._progress.update(self._tasks[key], completed=done, metrics=shown)

    def end(self, key: str, done: int, metrics: Mapping[str, Any], say: bool) -> None:
        """An epoch's bar stays until the next one's; an evaluation's goes."""
        self.update(key, done, metrics)
        if key == "evaluation":
            self._remove(key)
        elif key in self._tasks:
            self._progress.update(self._tasks[key], total=done if self._unknown(key) else None)
            self._progress.stop_task(self._tasks[key])
            if self._leave:
                del self._tasks[key]

    def close(self) -> None:
        """Draw once more and stop."""
        self._remove("evaluation")
        self._progress.stop()

    def _unknown(self, key: str) -> bool:
        return next(task.total is None for task in self._progress.tasks if task.id == self._tasks[key])

    def _remove(self, key: str) -> None:
        if key in self._tasks:
            self._progress.remove_task(self._tasks.pop(key))


@dataclass
class _Counting:
    label: str
    total: int | None
    began: float
    spoke: float
    first: tuple[int, float] | None = None


class PlainDisplay:
    """Plain lines, few of them.

    Args:
        write: Takes a line without its end; prints it to stdout by default.
        clock: Seconds, from any moment on.
    """

    def __init__(self, write: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write or _print, clock
        self._counting: dict[str, _Counting] = {}

    def start(self, key: str, label: str, total: int | None) -> None:
        """Begin without a word."""
        now = self._clock()
        self._counting[key] = _Counting(label[:1].lower() + label[1:], total, now, now)

    def update(self, key: str, done: int, metrics: Mapping[str, Any]) -> None:
        """A line, if the last one was long ago."""
        counting, now = self._counting.get(key), self._clock()
        if counting is None:
            return
        # Speed counts from the first report: in a resumed epoch what came before was not done here.
        counting.first = counting.first or (done, now)
        if now - counting.spoke < HEARTBEAT_SECONDS:
            return
        counting.spoke = now
        total = "" if counting.total is None else f"/{counting.total}"
        before, since = counting.first
        speed = f"{(done - before) / (now - since):.1f} it/s" if now > since else ""
        self._say(counting.label, f"{done}{total} batches", f"{now - counting.began:.1f} s", speed, metrics)

    def end(self, key: str, done: int, metrics: Mapping[str, Any], say: bool) -> None:
        """A line, if asked for."""
        counting = self._counting.pop(key, None)
        if counting is not None and say:
            self._say(counting.label, f"{done} batches", f"{self._clock() - counting.began:.1f} s", "", metrics)

    def close(self) -> None:
        """Forget what was begun."""
        self._counting.clear()

    def _say(self, label: str, batches: str, seconds: str, speed: str, metrics: Mapping[str, Any]) -> None:
        parts = (label, batches, seconds, speed, format_metrics(metrics))
        self._write("  ".join(part for part in parts if part))


def _print(line: str) -> None:
    print(line, file=sys.stdout, flush=True)
