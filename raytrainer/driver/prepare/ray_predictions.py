"""Prediction over a Ray Dataset: a lazy Dataset whose rows are the inputs with the predictions beside them."""

from __future__ import annotations

from typing import Any

from raytrainer.data.ray.blocks import settings_only
from raytrainer.data.ray.ray_dataset import RayDataset
from raytrainer.driver.workers.task_pickling import pickle_task
from raytrainer.errors import ConfigurationError
from raytrainer.plan.settings import Settings
from raytrainer.task import Task
from raytrainer.worker.actor.predictor import Predictor

__all__ = ["lazy_predictions"]


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

    packed, gpu, limit = ray.put((pickle_task(task), checkpoint)), settings.on_gpu, settings.limit("predict")
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
