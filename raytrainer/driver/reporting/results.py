"""What a run gives back, and prints: metrics of evaluations, and profiles."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytrainer.callbacks import ModelCheckpoint
from raytrainer.cells import html_table, in_notebook, show_html
from raytrainer.loggers.logger import Logger, first_log_dir
from raytrainer.metric_messages import Reduced
from raytrainer.plan.retention import free_name
from raytrainer.plan.uris import join_path
from raytrainer.profilers import Profiler
from raytrainer.view.run_state import RunState

__all__ = ["by_loader", "outputs_by_loader", "print_results", "say_end", "say_where_files_go", "write_profiles"]

log = logging.getLogger("raytrainer")


def by_loader(values: Reduced, loaders: int) -> list[dict[str, float]]:
    """Metrics of each loader: those logged in its batches, and those logged outside of batches."""
    results: list[dict[str, float]] = [{} for _ in range(loaders)]
    for name, value in values.logged.items():
        for loader in values.loaders.get(name, range(loaders)):
            results[loader][name] = value
    return results


def outputs_by_loader(outputs: Sequence[tuple[int, int, Any]], loaders: int) -> list[Any]:
    """Outputs of (loader, batch, output), in order: a list of them; with several loaders one list each."""
    batches: list[list[Any]] = [[] for _ in range(loaders)]
    for loader, _, output in outputs:
        batches[loader].append(output)
    return batches[0] if loaders == 1 else batches


def say_where_files_go(loggers: Sequence[Logger], callbacks: Sequence[object], default_root_dir: str) -> None:
    """Log the folders of logs and checkpoints, where there are any."""
    logs = [folder for folder in (logger.log_dir for logger in loggers) if folder]
    saving = [c for c in callbacks if isinstance(c, ModelCheckpoint) and c.saves]
    default = ModelCheckpoint.default_folder(first_log_dir(loggers) or default_root_dir)
    checkpoints = [default if callback.dirpath is None else callback.dirpath for callback in saving]
    if len(logs) == 1 and checkpoints == [join_path(logs[0], "checkpoints")]:
        log.info("Logs and checkpoints go to %s", logs[0])
        return
    for what, folders in (("Logs", logs), ("Checkpoints", checkpoints)):
        if folders:
            log.info("%s go to %s", what, ", ".join(dict.fromkeys(folders)))


def say_end(state: RunState) -> None:
    """Log what a `fit` took."""
    if state.time_report is not None:
        log.info("fit took %s", state.time_report)
        if state.time_report.hint is not None:
            log.info("%s", state.time_report.hint)
    peaks, skipped = state.peak_memory_bytes, state.skipped_steps
    if peaks:
        log.info("fit used at most %.2f GiB of GPU memory (rank %d).", max(peaks) / 2**30, peaks.index(max(peaks)))
    if skipped:
        log.info("%d of %d steps were left out for infinite gradients.", skipped, state.progress.step)


def print_results(stage: str, results: Sequence[Mapping[str, float]]) -> None:
    """Print what an evaluation has found: a column for each loader, or where there is no room for these, a row."""
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for result in results for name in result))
    if not names:
        return
    rows = [
        (f"{stage} metric", *("value" if len(results) == 1 else f"loader {index}" for index in range(len(results)))),
        *((name, *(f"{result[name]:.6g}" if name in result else "" for result in results)) for name in names),
    ]
    if in_notebook():
        show_html(html_table(rows, numbers=range(1, len(results) + 1)), "\n".join("  ".join(row) for row in rows))
        return
    console = Console()
    if len(results) > 1 and sum(max(map(len, column)) + 3 for column in zip(*rows, strict=True)) >= console.width:
        found = [(index, name, result[name]) for index, result in enumerate(results) for name in result]
        rows = [("loader", f"{stage} metric", "value"), *((f"{i}", name, f"{value:.6g}") for i, name, value in found)]
    table = Table(title=None)
    for head in rows[0]:
        table.add_column(head, justify="left" if head.endswith("metric") else "right")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def write_profiles(profiler: Profiler, profiles: Sequence[bytes | None], folder: Path) -> None:
    """Write every worker's profile to `rank<n>.<suffix>`; log rank 0's if it is for people to read.

    Args:
        profiler: Whose they are. Its `files` become the paths.
        profiles: By rank.
        folder: Where to; where that is taken, by an earlier run, another driver or anybody, `<folder>-v1` and so on.
    """
    profiler.files, name = [], type(profiler).__name__
    found = {rank: content for rank, content in enumerate(profiles) if content is not None}
    if not found:
        log.warning("%s has recorded nothing: the run was over too soon.", name)
        return
    path = folder
    try:
        path = folder = Path(free_name(str(folder), "", _is_taken))
        for rank, content in found.items():
            path = folder / f"rank{rank}.{profiler.suffix}"
            path.write_bytes(content)
            profiler.files.append(str(path))
    except OSError as error:  # a full disk must not fail a run that has trained
        log.warning("%s: %s cannot be written: %s", name, path, error)
        return
    if profiler.summary and 0 in found:
        log.info("%s, rank 0:\n%s", name, found[0].decode())
    log.info("%s wrote %s", name, profiler.files[0] if len(profiler.files) == 1 else folder)


def _is_taken(folder: str) -> bool:
    """Make it, if nobody has."""
    try:
        os.makedirs(folder)
    except FileExistsError:
        return True
    return False
