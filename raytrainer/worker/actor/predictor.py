"""Prediction over a Ray Dataset: a lazy Dataset whose rows are the inputs with the predictions beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from raytrainer.data.columns import finished, joined, prediction_columns, views
from raytrainer.data.dataset import RayDataset
from raytrainer.data.ray_data import settings_only
from raytrainer.errors import ConfigurationError
from raytrainer.packing import unpack
from raytrainer.plan.ranks import Ranks
from raytrainer.plan.settings import Settings
from raytrainer.strategies import SingleStrategy
from raytrainer.task import Task
from raytrainer.worker.worker_run import Run
from raytrainer.worker.worker_state import restore_state

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Predictor", "lazy_predictions"]


def lazy_predictions(sources: list[RayDataset], task: Task, checkpoint: Any, settings: Settings) -> list[Any]:
    """A `ray.data.Dataset` for each source, computed when it is read or written, by as many actors as workers.

    Args:
        sources: The inputs and their settings.
        task: The module and what it needs. It is copied now: later changes do not show.
        checkpoint: A packed checkpoint to load into the module, or None.
        settings: For the number of actors, their GPUs, and the limit.

    Raises:
        ConfigurationError: A limit that is a fraction: the rows are not counted before.
    """
    import ray

    packed, gpu, limit = ray.put((task, checkpoint)), settings.on_gpu, settings.limit("predict")
    if not isinstance(limit, int) and limit != 1.0:
        raise ConfigurationError(
            f"limit_predict_batches={limit}: a Ray Dataset is not counted before; give a number of batches."
        )
    predicted = []
    for source in sources:
        dataset = source.dataset.limit(limit * source.batch_size) if isinstance(limit, int) else source.dataset
        args = packed, settings_only(source), gpu
        predicted.append(_map_with_actors(dataset, args, source.batch_size, settings.world_size, gpu))
    return predicted


class Predictor:
    """Holds the module in evaluation mode in an actor of Ray Data's; turns a table into one with predictions.

    There is no run that it reports to: calls of `self.logger` lead nowhere, and nothing is profiled.
    """

    def __init__(self, packed: Any, source: RayDataset, on_gpu: bool) -> None:
        task, checkpoint = _get(packed)
        task = replace(task, logs=None if task.logs is None else False, profiler=None)
        self.source = source
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        self.run = Run(task, SingleStrategy(Ranks(), device))
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


def _map_with_actors(dataset: Any, args: tuple[Any, ...], batch_size: int, most: int, gpu: bool) -> Any:
    """The dataset with `Predictor(*args)` called on tables of `batch_size` rows, in at most `most` actors."""
    import ray
    from ray.data import ActorPoolStrategy

    if not gpu:  # reading needs a CPU too
        most = max(1, min(most, int(ray.cluster_resources().get("CPU", 1)) - 1))
    return dataset.map_batches(
        Predictor,
        fn_constructor_args=args,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=most),
        num_gpus=1 if gpu else None,
        num_cpus=None if gpu else 1,
    )


def _with_columns(table: pa.Table, columns: dict[str, Any]) -> pa.Table:
    """The table with NumPy arrays appended as columns; those of several dimensions as tensors."""
    from ray.data.block import BlockAccessor

    block = BlockAccessor.batch_to_block(columns)
    more = BlockAccessor.for_block(block).to_arrow()
    for name in columns:
        table = table.append_column(name, more.column(name))
    return table
