"""What an evaluation gives back, and prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["by_loader", "print_results"]


def by_loader(values: dict[str, float], loaders: int) -> list[dict[str, float]]:
    """Metrics of each loader: those that name it, and those that name none."""
    results: list[dict[str, float]] = [{} for _ in range(loaders)]
    for name, value in values.items():
        _, mark, index = name.rpartition("/dataloader_idx_")
        for loader in [int(index)] if mark else range(loaders):
            results[loader][name] = value
    return results


def print_results(stage: str, results: Sequence[Mapping[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for result in results for name in result))
    if not names:
        return
    table = Table(title=None)
    table.add_column(f"{stage} metric")
    for index in range(len(results)):
        table.add_column("value" if len(results) == 1 else f"loader {index}", justify="right")
    for name in names:
        table.add_row(name, *(f"{result[name]:.6g}" if name in result else "" for result in results))
    Console().print(table)
