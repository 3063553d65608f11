"""Metrics as a CSV file, hyperparameters as JSON."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrainer.errors import ConfigurationError
from raytrainer.loggers.logger import DirectoryLogger, as_mapping
from raytrainer.replaced_file import replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CSVLogger"]

FLUSH_SECONDS = 10.0


class CSVLogger(DirectoryLogger):
    """Writes `metrics.csv` and `hparams.json` to `<save_dir>/<name>/version_<n>`.

    One line for each call; columns "epoch" and "step" first, the others in the order in which they appeared. A name
    that turns up later gets a column at the right, for which the file is rewritten once. A file that exists already
    (a `version` given by hand, a second `fit`) is continued; one of somebody else's is left as it is, and said so.

    Args:
        save_dir: A local folder.
        name: Name of the experiment.
        version: Number or label. None: the next free number.
        flush_logs_every_n_steps: Lines are written to the file at least every so many, and otherwise at the first call
            more than ten seconds after the last time.

    Raises:
        ConfigurationError: `flush_logs_every_n_steps` is below 1, or `save_dir` is a URI.
    """

    def __init__(
        self,
        save_dir: str | Path,
        name: str = "logs",
        version: int | str | None = None,
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version)
        if flush_logs_every_n_steps < 1:
            raise ConfigurationError(
                f"CSVLogger(flush_logs_every_n_steps={flush_logs_every_n_steps}): must be 1 (every line) or more"
            )
        self._flush_every = flush_logs_every_n_steps
        self._rows: list[dict[str, Any]] = []
        self._columns: dict[str, None] = {}  # an ordered set; those of the file, then those still to be added
        self._in_file = 0  # how many of the columns the file's header has
        self._step = 0
        self._flushed = time.monotonic()
        self._hparams: dict[str, Any] = {}

    @property
    def path(self) -> Path:
        """The CSV file."""
        return Path(self.log_dir) / "metrics.csv"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a line."""
        self.log_rows([(self._step if step is None else step, metrics)])

    def log_rows(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Add lines."""
        if not self._columns:
            self._open()
        for step, metrics in rows:
            self._step = step
            self._columns.update(dict.fromkeys(metrics))
            self._rows.append({**{name: _plain(value) for name, value in metrics.items()}, "step": step})
        if len(self._rows) >= self._flush_every or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def log_hyperparams(self, params: Any) -> None:
        """Write `hparams.json`; what is no JSON is written as its text."""
        self._hparams.update(as_mapping(params))
        path = Path(self.log_dir) / "hparams.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._hparams = {**_earlier(path), **self._hparams}
        with replaced(path) as file:
            file.write(json.dumps(self._hparams, indent=2, default=_json_value, skipkeys=True) + "\n")

    def save(self) -> None:
        """Write what is still in memory."""
        self._flush()

    def plot(self, names: str | Sequence[str] | None = None) -> Figure:
        """Logged metrics over steps (needs matplotlib, extra `plot`).

        Each kind of metric has an axis of its own, which those of training, validation and test share. Where several
        runs went into the file, earlier ones are pale.

        Args:
            names: Metrics to plot: full names ("val_loss"), or names without their stage ("loss", for "train_loss" and
                "val_loss"). None: all.

        Returns:
            A figure that a notebook shows; elsewhere use its `savefig`. It is not known to pyplot.

        Raises:
            ConfigurationError: matplotlib is not installed, nothing was logged, or a name is unknown.
        """
        from raytrainer.loggers._plots import plot_rows

        self._flush()
        return plot_rows(self._series(), names, str(self.path))

    def _series(self) -> dict[str, list[tuple[int, float]]]:
        """The file's values by name, each with its step."""
        series: dict[str, list[tuple[int, float]]] = {}
        if self.path.is_file():
            with self.path.open(newline="") as file:
                for row in csv.DictReader(file):
                    for name, text in row.items():
                        value = None if name in ("epoch", "step") or not text else _number(text)
                        if value is not None:
                            series.setdefault(name, []).append((int(row["step"]), value))
        return series

    def _open(self) -> None:
        self._columns = {"epoch": None, "step": None}
        if self.path.is_file() and self.path.stat().st_size:
            with self.path.open(newline="") as file:
                header = next(csv.reader(file), [])
            if header[:2] != ["epoch", "step"]:
                raise ConfigurationError(
                    f"CSVLogger: {self.path} was not written by a CSVLogger, since its columns are {header[:5]}; give "
                    f"another name or version."
                )
            self._in_file = len(header)
            self._columns = dict.fromkeys([*header, *self._columns])
            _end_last_line(self.path)

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        if not self._rows:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns = list(self._columns)
        if self._in_file and (missing := len(columns) - self._in_file):
            _add_columns(self.path, columns, missing)
        # Opened for each flush: nothing stays open between runs, and the logger can be pickled.
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            if not self._in_file:
                writer.writeheader()
            writer.writerows(self._rows)
        self._in_file = len(columns)
        self._rows = []


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _json_value(value: Any) -> Any:
    try:
        return as_mapping(value)
    except ConfigurationError:
        return str(value)


def _earlier(path: Path) -> dict[str, Any]:
    """Hyperparameters that are there already: they stay, unless they are given anew."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigurationError(f"CSVLogger: {path} was not written by a CSVLogger; give another name or version.")
    return found


def _end_last_line(path: Path) -> None:
    """Close a line that a killed process left open."""
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\r\n")


def _add_columns(path: Path, columns: list[str], missing: int) -> None:
    """Give the file a new header, and its lines empty values for the columns at the right."""
    with replaced(path, newline="") as file, path.open(newline="") as old:
        writer = csv.writer(file)
        reader = csv.reader(old)
        width = len(next(reader))
        writer.writerow(columns)
        for row in reader:
            writer.writerow(row + [""] * (width - len(row) + missing))
