"""Arrow tables as columns that batches can be gathered from: views of shared memory, copied once, in large pieces."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from raytrainer.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from raytrainer.data.ray.ray_dataset import RayDataset

__all__ = [
    "Columns",
    "advice",
    "cut",
    "finished",
    "joined",
    "picked",
    "pinned",
    "require_one_type",
    "row_bytes",
    "selected",
    "views",
]

#: Columns of equal length: tensors where the values are numbers, otherwise NumPy arrays or Arrow arrays.
Columns = dict[str, Any]

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}

#: Scalar columns from which on it costs several times what one column of vectors would.
MANY_COLUMNS = 64


def views(table: pa.Table, names: Sequence[str] | None) -> list[tuple[Columns, int]]:
    """The columns of each chunk of a table, without copying numbers, and the chunk's rows.

    Raises:
        DataError: A column is not there.
    """
    if names is not None:
        missing = [name for name in names if name not in table.column_names]
        if missing:
            raise DataError(f"columns={list(names)}: the dataset has no {missing}, but {table.column_names}.")
        table = table.select(list(names))
    chunks = [chunk for chunk in table.to_batches() if chunk.num_rows]
    return [({n: _view(c.column(i)) for i, n in enumerate(table.column_names)}, c.num_rows) for c in chunks]


def _view(array: Any) -> Any:
    import pyarrow as pa

    if isinstance(array, pa.ExtensionArray):
        values = array.to_numpy_ndarray() if hasattr(array, "to_numpy_ndarray") else array.to_numpy(False)
        return _as_tensor(values)
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    kind = array.type
    if _whole_with_nulls(array):
        # Arrow would give floats, in which large integers and the nulls are lost
        values = np.empty(len(array), dtype=object)
        values[:] = array.to_pylist()
        return values
    if pa.types.is_fixed_size_list(kind) and not array.null_count and _numeric(kind.value_type):
        return _as_tensor(array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), kind.list_size))
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _numeric(kind.value_type):
        return _list_view(array)
    if _numeric(kind):
        return _as_tensor(array.to_numpy(zero_copy_only=False))
    return array


def _whole_with_nulls(array: Any) -> bool:
    """Whether it holds integers or booleans, or lists of them, of which some are null.

    Also lists of a fixed size, of which some are null: Arrow has numbers in their places, which are null too.
    """
    import pyarrow as pa

    nulls = 0
    while _is_list(array.type):
        nulls += array.null_count if pa.types.is_fixed_size_list(array.type) else 0
        array = array.flatten()
    whole = pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)
    return bool(whole and (array.null_count or nulls))


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _list_view(array: Any) -> Any:
    """Lists that all have one length, as a matrix."""
    offsets = array.offsets.to_numpy()
    width = int(offsets[1] - offsets[0])
    flat = array.flatten()
    if array.null_count or width == 0 or len(flat) != width * len(array) or (np.diff(offsets) != width).any():
        return array
    return _as_tensor(flat.to_numpy(zero_copy_only=False).reshape(len(array), width))


def _numeric(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _as_tensor(values: Any) -> Any:
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        return values
    with warnings.catch_warnings():
        # shared memory is read-only, and nobody writes to these views: batches are copies
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(values)


def cut(columns: Columns, start: int, stop: int) -> Columns:
    """Rows `start` to `stop`, without copying."""
    return {name: values[start:stop] for name, values in columns.items()}


def joined(parts: Sequence[Columns], copy: bool = True) -> Columns:
    """The rows of all parts. `copy`: also where there is only one part."""
    if len(parts) == 1 and not copy:
        return parts[0]
    return {name: _joined(name, [part[name] for part in parts]) for name in parts[0]}


def _joined(name: str, arrays: Sequence[Any]) -> Any:
    if all(isinstance(array, Tensor) for array in arrays):
        require_one_type(name, {array.dtype for array in arrays})
        if len({array.shape[1:] for array in arrays}) == 1:
            return arrays[0].clone() if len(arrays) == 1 else torch.cat(list(arrays))
    return _concatenated([_as_numpy(array) for array in arrays])


def require_one_type(name: str, types: set[torch.dtype]) -> None:
    """Raise a DataError if a column holds integers in one place and floating-point numbers in another."""
    floating = [kind for kind in types if kind.is_floating_point]
    if 0 < len(floating) < len(types):
        found = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
        raise DataError(
            f"column {name!r} holds {found} in different blocks (pandas makes floats of integers with nulls): cast it "
            f"to one type before, e.g. with map_batches, or leave it out with columns=[...]."
        )


def _concatenated(arrays: Sequence[Any]) -> Any:
    if len({array.shape[1:] for array in arrays}) > 1:  # images of one size here and of another there
        rows = [row for array in arrays for row in array]
        together = np.empty(len(rows), dtype=object)
        together[:] = rows
        return together
    return np.concatenate(list(arrays))


def _as_numpy(array: Any) -> Any:
    if isinstance(array, Tensor):
        return array.numpy()
    return array if isinstance(array, np.ndarray) else array.to_numpy(zero_copy_only=False)


def picked(columns: Columns, rows: Tensor) -> Columns:
    """The rows of these numbers, in this order, copied."""
    return {
        name: selected(values, rows) if isinstance(values, Tensor) else _taken(values, rows.numpy())
        for name, values in columns.items()
    }


def selected(values: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows by number; also of unsigned integers, which torch's `index_select` does not take."""
    signed = _SIGNED.get(values.dtype)
    if signed is None:
        return torch.index_select(values, 0, rows, out=out)
    out = None if out is None else out.view(signed)
    return torch.index_select(values.view(signed), 0, rows, out=out).view(values.dtype)


def _taken(values: Any, rows: Any) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else _as_numpy(values.take(rows))


def pinned(columns: Columns) -> Columns:
    """Tensors in memory from which a GPU can copy by itself; what a `collate_fn` will make batches of stays."""
    return {name: values.pin_memory() if isinstance(values, Tensor) else values for name, values in columns.items()}


def row_bytes(columns: Columns, rows: int) -> int:
    """Bytes of one row, roughly."""
    total = 0
    for values in columns.values():
        total += values.numel() * values.element_size() if isinstance(values, Tensor) else int(values.nbytes)
    return max(1, total // max(1, rows))


def finished(columns: Columns, source: RayDataset) -> Columns:
    """Columns with the types asked for; with a `collate_fn`, as NumPy arrays.

    Raises:
        DataError: A column that cannot be a tensor, and no `collate_fn`.
    """
    result = {}
    for name, values in columns.items():
        wanted = source.dtypes.get(name) if isinstance(source.dtypes, Mapping) else None
        if wanted is not None and wanted.is_floating_point and _has_nulls(values):
            values = torch.tensor([float("nan") if value is None else value for value in values], dtype=wanted)
        if not isinstance(values, Tensor):
            if source.collate_fn is None:
                nan = f", or have NaN for null by dtypes={{{name!r}: torch.float64}}" if _has_nulls(values) else ""
                raise DataError(
                    f"column {name!r} holds {_kind(values)}, which cannot be a tensor: leave it out with "
                    f"columns=[...], or make a batch of it with collate_fn{nan}."
                )
            result[name] = values
            continue
        dtype = source.dtypes.get(name) if isinstance(source.dtypes, Mapping) else source.dtypes
        if dtype is not None and (isinstance(source.dtypes, Mapping) or values.is_floating_point()):
            values = values.to(dtype)
        result[name] = values.numpy() if source.collate_fn is not None and values.dtype != torch.bfloat16 else values
    return result


def _has_nulls(values: Any) -> bool:
    """Whether it is a column of numbers, of which some are null."""
    if not isinstance(values, np.ndarray) or values.dtype != object or values.ndim != 1:
        return False
    found = {type(value) for value in values}
    return type(None) in found and all(kind is type(None) or issubclass(kind, (bool, int, np.number)) for kind in found)


def _kind(values: Any) -> str:
    if not isinstance(values, np.ndarray) or values.dtype != object or not len(values):
        return f"values of type {values.dtype if isinstance(values, np.ndarray) else values.type}"
    if any(value is None for value in values):
        return "whole numbers or booleans with nulls" if _has_nulls(values) else "nulls"
    first = values[0]
    return f"arrays of varying shape, e.g. {first.shape}" if isinstance(first, np.ndarray) else type(first).__name__


def advice(schema: Any) -> str | None:
    """What is slow about a dataset's columns; None if nothing is."""
    import pyarrow as pa

    fields = list(zip(schema.names, schema.types, strict=True))
    lists = [n for n, t in fields if isinstance(t, pa.DataType) and (pa.types.is_list(t) or pa.types.is_large_list(t))]
    scalars = [n for n, t in fields if isinstance(t, pa.DataType) and _numeric(t)]
    if lists:
        return (
            f"column(s) {', '.join(lists[:5])}{' ...' if len(lists) > 5 else ''} hold variable-size lists, which are "
            f"read 3-4 times slower than fixed-size lists (pyarrow.list_(type, size)) or tensor columns"
        )
    if len(scalars) >= MANY_COLUMNS:
        return (
            f"{len(scalars)} columns of single numbers are read 3-4 times slower than one column of fixed-size lists "
            f"(pyarrow.list_(type, size)) or tensors"
        )
    return None
