"""How `ProgressBar` shows things in a notebook: one output, redrawn in place, that stays when the run is over."""

from __future__ import annotations

import html
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raytrainer.callbacks._numbers import format_metrics

__all__ = ["NotebookDisplay"]

#: How many epochs' bars stay where nothing else is asked for: long runs have very many.
STAY = 30

#: Shows a mime bundle: new the first time, in place of the former afterwards.
Show = Callable[[dict[str, Any]], None]

_ROW = 'style="border:0;background:none;text-align:left;padding:1px 10px 1px 0;white-space:nowrap"'
_LAST = 'style="border:0;background:none;text-align:left;padding:1px 0"'
_NUMBERS = 'style="font-variant-numeric:tabular-nums"'


@dataclass
class _Row:
    label: str
    total: int | None
    began: float
    done: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    first: tuple[int, float] | None = None
    seconds: float | None = None  # how long it took, once it is over


class NotebookDisplay:
    """Bars in a single output of the cell. Needs no widgets, so that a saved notebook shows them too.

    Args:
        refresh_rate: Seconds between redraws.
        leave: Keep the bars of earlier epochs: all, none, or with None the last `STAY`.
        show: Takes what to show; IPython's display by default.
        clock: Seconds, from any moment on.
    """

    def __init__(
        self,
        refresh_rate: float,
        leave: bool | None,
        show: Show | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._refresh_rate, self._leave, self._clock = refresh_rate, leave, clock
        self._show = show or _cell_output()
        self._rows: dict[str, _Row] = {}
        self._past: deque[_Row] = deque(maxlen=STAY if leave is None else None)
        self._dropped = 0
        self._drawn = -math.inf
        self._changed = False

    def start(self, key: str, label: str, total: int | None) -> None:
        """Add a bar."""
        self._rows.pop(key, None)  # a new bar goes below those that are there
        self._rows[key] = _Row(label, total, self._clock())
        self._draw()

    def update(self, key: str, done: int, metrics: Mapping[str, Any]) -> None:
        """Move a bar."""
        row = self._rows.get(key)
        if row is None:
            return
        row.done, row.metrics = done, dict(metrics)
        # Speed counts from the first report: in a resumed epoch what came before was not done here.
        row.first = row.first or (done, self._clock())
        self._draw()

    def end(self, key: str, done: int, metrics: Mapping[str, Any], say: bool) -> None:
        """The bar is over. An epoch's stays, as `leave` says; that of an evaluation within a fit goes."""
        row = self._rows.get(key)
        if row is None:
            return
        row.done, row.total, row.metrics = done, done if row.total is None else row.total, dict(metrics)
        row.seconds = self._clock() - row.began
        if not say:
            del self._rows[key]
        elif self._leave is not False and key == "train":
            self._dropped += len(self._past) == self._past.maxlen
            self._past.append(self._rows.pop(key))
        self._draw()

    def close(self) -> None:
        """Draw the end; what was in progress stands still."""
        for row in self._rows.values():
            row.seconds = self._clock() - row.began if row.seconds is None else row.seconds
        if self._changed:
            self._draw(force=True)

    def _draw(self, force: bool = False) -> None:
        self._changed = True
        if force or self._clock() - self._drawn >= self._refresh_rate:
            self._drawn, self._changed = self._clock(), False
            self._show(self._bundle())

    def _bundle(self) -> dict[str, Any]:
        rows = [*self._past, *self._rows.values()]
        cells = "".join(self._html(row) for row in rows)
        lines = [self._text(row) for row in rows]
        if self._dropped:
            earlier = f"{self._dropped} earlier epochs: ProgressBar(leave=True) keeps all"
            cells = f'<tr style="background:none"><td colspan="4" {_LAST}>{html.escape(earlier)}</td></tr>{cells}'
            lines.insert(0, earlier)
        return {
            "text/plain": "\n".join(lines),
            "text/html": f'<table style="border:0;font-size:90%"><tbody>{cells}</tbody></table>',
        }

    def _html(self, row: _Row) -> str:
        # no value: a bar that shows activity, for an unknown length
        value = "" if row.total is None else f' value="{row.done}" max="{max(row.total, 1)}"'
        bar = f'<progress{value} style="width:14em;vertical-align:middle"></progress>'
        numbers = f"<span {_NUMBERS}>{html.escape('  '.join(self._numbers(row)))}</span>".replace("  ", " &ensp;")
        metrics = f"<span {_NUMBERS}>{html.escape(format_metrics(row.metrics, '=', '  '))}</span>"
        return (
            f'<tr style="background:none"><td {_ROW}>{html.escape(row.label)}</td><td {_ROW}>{bar}</td>'
            f"<td {_ROW}>{numbers}</td><td {_LAST}>{metrics.replace('  ', ' &ensp;')}</td></tr>"
        )

    def _text(self, row: _Row) -> str:
        return "  ".join(part for part in (row.label, *self._numbers(row), format_metrics(row.metrics)) if part)

    def _numbers(self, row: _Row) -> list[str]:
        """E.g. ["24/38", "0:03 < 0:02", "8.1 it/s"]; the time left is missing from what is over."""
        now = self._clock()
        elapsed = now - row.began if row.seconds is None else row.seconds
        speed = row.done / elapsed if row.seconds and row.done else 0.0
        if row.seconds is None and row.first is not None and now > row.first[1]:
            speed = (row.done - row.first[0]) / (now - row.first[1])
        left = ""
        if row.seconds is None and row.total is not None and speed:
            left = f" < {_clock_text((row.total - row.done) / speed)}"
        count = str(row.done) if row.total is None else f"{row.done}/{row.total}"
        pace = "" if not speed else f"{speed:.1f} it/s" if speed >= 1 else f"{1 / speed:.1f} s/it"
        return [part for part in (count, _clock_text(elapsed) + left, pace) if part]


def _clock_text(seconds: float) -> str:
    """ "0:07", "12:30", "1:00:02"."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _cell_output() -> Show:
    from IPython.display import display

    handle: Any = None

    def show(bundle: dict[str, Any]) -> None:
        nonlocal handle
        if handle is None:
            handle = display(bundle, raw=True, display_id=True)
        else:
            handle.update(bundle, raw=True)

    return show
