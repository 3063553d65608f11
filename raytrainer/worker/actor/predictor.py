"""`Predictor`: what runs in the actors of Ray Data that predict for a Ray Dataset."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raytrainer.quick_imports import importing

with importing(alone=True):  # as in a worker's process, see actor.py
    import torch

    from raytrainer.data.ray.columns import finished, joined, views
    from raytrainer.data.ray.prediction_columns import prediction_columns
    from raytrainer.data.ray.ray_dataset import RayDataset
    from raytrainer.plan.ranks import Ranks
    from raytrainer.strategies import SingleStrategy
    from raytrainer.tensor_packing import unpack
    from raytrainer.worker.worker_run import WorkerRun
    from raytrainer.worker.worker_state import restore_state

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Predictor"]


class Predictor:
    """Holds the module in evaluation mode in an actor of Ray Data's; turns a table into one with predictions.

    There is no run that it reports to: calls of `self.logger` lead nowhere, and nothing is profiled.
    """

    def __init__(self, packed: Any, source: RayDataset, on_gpu: bool) -> None:
        pickled, checkpoint = _get(packed)
        task = pickled.get()
        task = replace(task, logs=None if task.logs is None else False, profiler=None)
        self.source = source
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        self.run = WorkerRun(task, SingleStrategy(Ranks(), device))
        self.run.setup()
        if checkpoint is not None:
            restore_state(self.run, unpack(checkpoint))
        self.run.module.eval()
        self.step = self.run.step("predict_step", 1)
        self.batch = 0
        inference = task.settings.inference_mode
        self.no_grad = torch.inference_mode if inference else torch.no_grad

    def __call__(self, table: Any) -> Any:
        chunks = views(table, self.source.columns)
        columns = finished(joined([columns for columns, _ in chunks]), self.source)
        batch: Any = columns if self.source.collate_fn is None else self.source.collate_fn(columns)
        with self.no_grad():
            if self.run.transfer is not None:
                batch = self.run.transfer(batch, 0)
            output = self.step(batch, self.batch, 0)
        self.batch += 1
        return _with_columns(table, prediction_columns(output, table.column_names, table.num_rows))


def _get(ref: Any) -> Any:
    """What a reference stands for; Ray Data may have looked it up already."""
    import ray

    return ray.get(ref) if isinstance(ref, ray.ObjectRef) else ref


def _with_columns(table: pa.Table, columns: dict[str, Any]) -> pa.Table:
    """The table with NumPy arrays appended as columns; those of several dimensions as tensors."""
    from ray.data.block import BlockAccessor

    block = BlockAccessor.batch_to_block(columns)
    more = BlockAccessor.for_block(block).to_arrow()
    for name in columns:
        table = table.append_column(name, more.column(name))
    return table
