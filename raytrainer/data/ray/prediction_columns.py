"""What `predict_step` returns, as columns of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrainer.errors import DataError

__all__ = ["prediction_columns"]


def prediction_columns(output: Any, taken: Sequence[str], rows: int | None = None) -> dict[str, Any]:
    """What `predict_step` returned, as NumPy columns: "prediction", "prediction_0", ... of a tuple, or a dict's names.

    Args:
        output: A tensor, array or list with one entry for each row, or a dict or tuple of them.
        taken: Names that it must not have.
        rows: Their number; None: that of the first column.

    Raises:
        DataError: It has another number of rows, or a name that is taken.
    """
    if isinstance(output, Mapping):
        named = dict(output)
    elif isinstance(output, tuple):
        named = {f"prediction_{i}": value for i, value in enumerate(output)}
    else:
        named = {"prediction": output}
    columns = {}
    for name, value in named.items():
        if name in taken:
            raise DataError(f"predict_step returned {name!r}, which is a column already; choose another name.")
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        elif isinstance(value, list):
            value = np.array(value)
        if rows is None and isinstance(value, np.ndarray) and value.ndim:
            rows = len(value)
        if not isinstance(value, np.ndarray) or value.ndim == 0 or len(value) != rows:
            got = f"shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise DataError(
                f"predict_step returned {got} as {name!r} for a batch of {rows} row(s): return a tensor, or a dict or "
                f"tuple of tensors, with one entry for each row."
            )
        columns[name] = value
    return columns
