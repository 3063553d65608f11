"""Prediction over a Ray Dataset: a lazy Dataset whose rows are the inputs with the predictions beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrainer.data import ray_data
from raytrainer.data.columns import finished, joined, views
from raytrainer.data.dataset import RayDataset
from raytrainer.errors import ConfigurationError, DataError
from raytrainer.messages import Task
from raytrainer.packing import unpack
from raytrainer.plan.ranks import Ranks
from raytrainer.plan.settings import Settings
from raytrainer.seeding import rng_untouched
from raytrainer.strategies import SingleStrategy
from raytrainer.worker.hooks import overridden
from raytrainer.worker.run import Run
from raytrainer.worker.state import restore_state

__all__ = ["Predictor", "lazy_predictions"]


def lazy_predictions(source: RayDataset, task: Any, settings: Settings) -> Any:
    """A `ray.data.Dataset` that is computed when it is read or written, by as many actors as there are workers.

    Args:
        source: The inputs and their settings.
        task: A reference to (task, checkpoint), for the actors.
        settings: For the number of actors, their GPUs, and the limit.

    Raises:
        ConfigurationError: A limit that is a fraction: the rows are not counted before.
    """
    dataset, limit = source.dataset, settings.limit("predict")
    if isinstance(limit, int):
        dataset = dataset.limit(limit * source.batch_size)
    elif limit != 1.0:
        raise ConfigurationError(
            f"limit_predict_batches={limit}: a Ray Dataset is not counted before; give a number of batches."
        )
    return ray_data.map_with_actors(
        dataset,
        Predictor,
        (task, source_without_data(source), settings.on_gpu),
        source.batch_size,
        settings.world_size,
        settings.on_gpu,
    )


def source_without_data(source: RayDataset) -> RayDataset:
    return ray_data.settings_only(source)


class Predictor:
    """Holds the module in evaluation mode in an actor of Ray Data's; turns a table into one with predictions."""

    def __init__(self, packed: Any, source: RayDataset, on_gpu: bool) -> None:
        task, checkpoint = ray_data.get(packed)
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
        return ray_data.with_columns(table, _columns(output, table.num_rows, table.column_names))


def _columns(output: Any, rows: int, taken: list[str]) -> dict[str, Any]:
    """What `predict_step` returned, as columns of `rows` rows.

    Raises:
        DataError: It has another number of rows, or a name that the inputs have.
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
            raise DataError(f"predict_step returned {name!r}, which is a column of the dataset; choose another name.")
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        elif isinstance(value, list):
            value = np.array(value)
        if not isinstance(value, np.ndarray) or value.ndim == 0 or len(value) != rows:
            got = f"shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise DataError(
                f"predict_step returned {got} as {name!r} for a batch of {rows} row(s): return a tensor, or a dict or "
                f"tuple of tensors, with one entry for each row."
            )
        columns[name] = value
    return columns


def check_predicts(task: Task) -> None:
    """Refuse a module that cannot predict.

    Raises:
        ConfigurationError: There is neither `predict_step` nor `forward`.
    """
    if not overridden(task.module, "predict_step") and not overridden(task.module, "forward"):
        raise ConfigurationError(f"{type(task.module).__name__} has no predict_step() and no forward().")
