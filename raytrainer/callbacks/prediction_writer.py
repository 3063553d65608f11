"""Write predictions to Parquet, from the workers that make them."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Any

from raytrainer.callbacks.callback import WorkerCallback
from raytrainer.checkpointing.places import locate
from raytrainer.checkpointing.reservations import require_writable
from raytrainer.data.ray.prediction_columns import prediction_columns
from raytrainer.errors import ConfigurationError, StorageError
from raytrainer.plan import argument_checks as checks
from raytrainer.plan.uris import absolute_or_uri

if TYPE_CHECKING:
    import pyarrow as pa

    from raytrainer.module import Module
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["PredictionWriter"]

# where a row belongs: the loader, the batch in the whole loader, the slice (dp, ddp2) and the row in it
_PLACE = ["dataloader_idx", "batch_idx", "slice_idx", "row_idx"]
_GROUP_BYTES = 64 * 2**20  # of a row group


class PredictionWriter(WorkerCallback):
    """Writes what `predict_step` returns: a tensor (column "prediction"), or a dict or tuple of them, a row a sample.

    Four more columns say where a row belongs, so that `PredictionWriter.read` gives the loader's order. Tensors of
    several dimensions become lists of fixed size. Use it with `trainer.predict(..., return_predictions=False)`; where
    `predict_step` returns None, nothing is written. Of workers that split layers, and so predict the same, one writes.
    Ray Datasets write their predictions themselves.

    Args:
        path: A folder, on a file system that all workers see, or a URI: of pyarrow's ("s3://bucket/x") or of fsspec's
            ("fsspec+memory://x").
        write_interval: "epoch": one file a worker, `part-<rank>.parquet`, written as batches come; "batch": one a
            batch, `part-<rank>-<loader>-<batch>.parquet`.
        overwrite: Delete predictions that are there; otherwise they are an error. Parquet files of others always are.

    Raises:
        ConfigurationError: Another interval, files that are there, or a folder that cannot be written to.
        StorageError: A file cannot be written to its end, the disk being full, say; it is removed.
        DataError: A step's output is not one row a sample.
    """

    def __init__(self, path: str | os.PathLike[str], write_interval: str = "epoch", overwrite: bool = False) -> None:
        self.path = absolute_or_uri(path)
        self.write_interval = checks.choice("PredictionWriter(write_interval)", write_interval, ("epoch", "batch"))
        self.overwrite = overwrite
        self._tables: list[pa.Table] = []  # not written yet
        self._bytes = 0  # of them
        self._writer: Any = None
        self._name = ""  # of the file that is being written

    @property
    def state_key(self) -> str:
        """Names the folder, so that several can be used side by side."""
        return f"PredictionWriter({self.path!r})"

    @staticmethod
    def read(path: str | os.PathLike[str]) -> pa.Table:
        """All rows that a run has written, in the order of its loaders."""
        import pyarrow.parquet as pq

        filesystem, folder = locate(os.fspath(path))
        table = pq.read_table(folder, filesystem=filesystem)
        return table.sort_by([(name, "ascending") for name in _PLACE])

    def on_predict_start(self, trainer: TrainerView, module: Module) -> None:
        """See to the folder; no worker writes before all have."""
        self._tables, self._bytes = [], 0
        files = _parquet_files(self.path)
        if files and not self.overwrite:
            raise ConfigurationError(
                f"PredictionWriter({self.path!r}): there are Parquet files, such as {files[0]!r}; give another folder, "
                f"or overwrite=True."
            )
        foreign = [name for name in files if not _is_prediction(self.path, name)]
        if foreign:
            raise ConfigurationError(
                f"PredictionWriter({self.path!r}, overwrite=True): {foreign[0]!r} holds no predictions of a "
                f"PredictionWriter, and is not deleted; give another folder."
            )
        if not trainer.is_global_zero:
            return
        filesystem, folder = locate(self.path)
        for name in files:
            filesystem.delete_file(f"{folder}/{name}")
        require_writable(self.path, "PredictionWriter")

    def on_predict_batch_end(
        self, trainer: TrainerView, module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the batch's rows, or keep them until they are worth it."""
        if outputs is None or not trainer.strategy.counts:
            return
        share = trainer.strategy.share
        index = batch_idx * share.count + share.index
        table = _table(outputs, dataloader_idx, index, trainer.strategy.split.index)
        if self.write_interval == "batch":
            self._write([table], f"part-{trainer.global_rank:05d}-{dataloader_idx}-{index:06d}.parquet")
            self._close()
            return
        self._tables.append(table)
        self._bytes += table.nbytes
        if self._bytes > _GROUP_BYTES:
            self._flush(trainer)

    def on_predict_epoch_end(self, trainer: TrainerView, module: Module) -> None:
        """Complete the worker's file."""
        self._flush(trainer)
        self._close()

    def on_exception(self, trainer: TrainerView, module: Module, exception: BaseException) -> None:
        """Close the file."""
        with contextlib.suppress(StorageError):  # the first failure is the one to tell
            self._close()

    def _flush(self, trainer: TrainerView) -> None:
        tables, self._tables, self._bytes = self._tables, [], 0
        if tables:
            self._write(tables, f"part-{trainer.global_rank:05d}.parquet")

    def _write(self, tables: list[pa.Table], name: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        filesystem, folder = locate(self.path)
        try:
            if self._writer is None:
                if "://" not in self.path:
                    self._reserve(f"{folder}/{name}")
                self._writer = pq.ParquetWriter(f"{folder}/{name}", tables[0].schema, filesystem=filesystem)
                self._name = name
            self._writer.write_table(pa.concat_tables(tables))
        except OSError as error:
            writer, self._writer = self._writer, None
            self._give_up(writer, name, error)

    def _give_up(self, writer: Any, name: str, error: OSError) -> None:
        """Delete a file that cannot be written to its end, and say so.

        Raises:
            StorageError: Always.
        """
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()
            writer.is_open = False  # or it would try once more when it is gone
        filesystem, folder = locate(self.path)
        with contextlib.suppress(OSError):
            filesystem.delete_file(f"{folder}/{name}")
        raise StorageError(
            f"{self.path}/{name}: the predictions cannot be written: {error}. What there was of this file is removed."
        ) from error

    def _reserve(self, file: str) -> None:
        """Make a new file, so that no other run can have the same."""
        try:
            open(file, "xb").close()
        except FileExistsError:
            raise ConfigurationError(
                f"PredictionWriter({self.path!r}): {os.path.basename(file)} has come there since this run began: "
                "another one writes to the same folder. Give each its own."
            ) from None

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                self._give_up(writer, self._name, error)


def _table(outputs: Any, loader: int, batch: int, part: int) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    columns = prediction_columns(outputs, _PLACE)
    rows = len(next(iter(columns.values()), ()))
    place = [np.full(rows, loader), np.full(rows, batch), np.full(rows, part), np.arange(rows)]
    return pa.table({name: _arrow(c) for name, c in (*zip(_PLACE, place, strict=True), *columns.items())})


def _arrow(values: Any) -> pa.Array:
    """An array of any number of dimensions, the first of which are the rows."""
    import pyarrow as pa

    array = pa.array(values.reshape(-1))
    for size in values.shape[:0:-1]:
        array = pa.FixedSizeListArray.from_arrays(array, int(size))
    return array


def _is_prediction(path: str, name: str) -> bool:
    """Whether a Parquet file is one of a `PredictionWriter`: it has the columns that say where a row belongs.

    Of a run that was killed there are files without an end, which say nothing but their names.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, folder = locate(path)
    try:
        return set(_PLACE) <= set(pq.read_schema(f"{folder}/{name}", filesystem=filesystem).names)
    except FileNotFoundError:
        return True  # rank 0 has deleted it
    except pa.ArrowInvalid:
        return re.fullmatch(r"part-\d{5}(-\d+-\d{6,})?\.parquet", name) is not None


def _parquet_files(path: str) -> list[str]:
    from pyarrow import fs

    filesystem, folder = locate(path)
    found = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return sorted(info.base_name for info in found if info.base_name.endswith(".parquet"))
