"""Whether code runs in a notebook, and tables as its cells show them."""

from __future__ import annotations

import base64
import html
import sys
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["cell_number", "html_table", "in_notebook", "show_html", "show_png"]

_CELL = 'style="border:0;background:none;text-align:{};padding:1px 14px 1px 0"'


def _shell() -> Any:
    """IPython's, where a kernel runs it; None in terminals, IPython's own too."""
    module = sys.modules.get("IPython")
    shell = None if module is None else module.get_ipython()
    return shell if getattr(shell, "kernel", None) is not None else None


def in_notebook() -> bool:
    """Whether output goes to a cell."""
    return _shell() is not None


def cell_number() -> int | None:
    """Of the cell that runs; None outside of notebooks."""
    shell = _shell()
    return None if shell is None else int(shell.execution_count)


def html_table(rows: Sequence[Sequence[str]], below: Iterable[str] = (), numbers: Iterable[int] = ()) -> str:
    """A table whose first row is its head, and lines below it.

    Args:
        rows: Texts.
        below: Lines of text.
        numbers: Columns that are aligned to the right.
    """
    right = set(numbers)

    def line(row: Sequence[str], tag: str) -> str:
        cells = (
            f"<{tag} {_CELL.format('right' if column in right else 'left')}>{html.escape(text)}</{tag}>"
            for column, text in enumerate(row)
        )
        return f'<tr style="background:none">{"".join(cells)}</tr>'

    head, *body = rows
    table = f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in body)}</table>" if body else ""
    return table + "".join(f"<div>{html.escape(text)}</div>" for text in below)


def show_html(text: str, plain: str) -> None:
    """Show it in the cell that runs; `plain` is what a viewer without HTML shows."""
    from IPython.display import display

    display({"text/html": text, "text/plain": plain}, raw=True)


def show_png(picture: bytes, plain: str) -> None:
    """Likewise, a picture."""
    from IPython.display import display

    display({"image/png": base64.b64encode(picture).decode(), "text/plain": plain}, raw=True)
