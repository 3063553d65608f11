"""Ray Datasets of a run: asking the driver's hooks for them, and making them ready for the workers."""

from __future__ import annotations

from typing import Any

from raytrainer.data.ray.ray_dataset import RayDataset, as_ray_datasets
from raytrainer.driver.cluster.session import Cluster, ensure_ray, free_resources
from raytrainer.driver.workers import idle_pool
from raytrainer.errors import ConfigurationError
from raytrainer.plan.settings import Settings
from raytrainer.task import Task
from raytrainer.tensor_packing import pack
from raytrainer.worker.hook_calls import overridden

__all__ = ["find_datasets", "has_dataset", "lazy_predictions", "prepare_datasets", "release_datasets"]

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


def _leave_a_cpu() -> None:
    """Release the workers kept for the next run where they hold every CPU: reading would wait for one of them."""
    if free_resources("CPU") < 1:
        idle_pool.close_idle()


def has_dataset(stage: str, *owners: Any) -> bool:
    """Whether the first of `owners` that says where data of this stage comes from, says so with a dataset hook."""
    return _owner(stage, owners) is not None


def _owner(stage: str, owners: tuple[Any, ...]) -> Any:
    for owner in owners:
        if owner is None:
            continue
        dataset, loader = (overridden(owner, f"{stage}_{kind}") for kind in ("dataset", "dataloader"))
        # an attribute that is no method is what the user's loader reads: many DataModules call it so
        dataset = dataset and callable(getattr(owner, f"{stage}_dataset"))
        if dataset and loader:
            raise ConfigurationError(
                f"{type(owner).__name__} has {stage}_dataset() and {stage}_dataloader(): write one of them."
            )
        if dataset or loader:
            return owner if dataset else None
    return None


def find_datasets(
    stage: str, loaders: dict[str, Any], datamodule: Any, module: Any, cluster: Cluster, workers: int
) -> list[RayDataset] | None:
    """The Ray Datasets of "train", "val", "test" or "predict": those handed over, or what a hook returns; or None.

    Raises:
        ConfigurationError: A dataset hook returned something else.
    """
    if stage in loaders:
        return as_ray_datasets(loaders[stage])
    owner = _owner(stage, (datamodule, module))
    if owner is None:
        return None
    ensure_ray(cluster, workers)  # rather than let the hook's first call start one with too few CPUs
    _leave_a_cpu()
    answer = getattr(owner, f"{stage}_dataset")()
    if answer is None:
        return None
    datasets = as_ray_datasets(answer)
    if datasets is None:
        raise ConfigurationError(
            f"{type(owner).__name__}.{stage}_dataset() returned {type(answer).__name__}: return a RayDataset or a "
            f"ray.data.Dataset; torch data belongs into {stage}_dataloader()."
        )
    return datasets


def lazy_predictions(task: Task, settings: Settings, cluster: Cluster, checkpoint: Any) -> Any:
    """Predictions for the Ray Datasets of a run as Ray Datasets: one, or a list; None if it has no Ray Datasets."""
    datasets = find_datasets("predict", task.loaders, task.datamodule, task.module, cluster, settings.world_size)
    if datasets is None:
        return None
    from raytrainer.data.ray import kept_or_streamed as ray_data
    from raytrainer.driver.prepare import ray_predictions

    ensure_ray(cluster, settings.world_size)
    idle_pool.close_idle()  # workers kept for the next run hold the CPUs and GPUs that these actors need
    ray_data.require_free_cpu(1)
    task.loaders = {}
    packed = pack(checkpoint) if checkpoint is not None else None
    predicted = ray_predictions.lazy_predictions(datasets, task, packed, settings)
    return predicted[0] if len(predicted) == 1 else predicted


def release_datasets(task: Task) -> None:
    """The run is over: end what reads its datasets."""
    for blocks in (blocks for stage in task.datasets.values() for blocks in stage):
        blocks.close()
    if task.datasets:
        idle_pool.tell_none()


@idle_pool.kept()
def prepare_datasets(task: Task, settings: Settings, cluster: Cluster) -> None:
    """Put the run's Ray Datasets into the task; the loaders handed over that are none stay there.

    Raises:
        ResourceError: The workers would leave no CPU for Ray Data.
    """
    workers = settings.world_size
    found: dict[str, list[RayDataset]] = {}
    for stage in _STAGES[task.stage]:
        datasets = find_datasets(stage, task.loaders, task.datamodule, task.module, cluster, workers)
        if datasets is not None:
            task.loaders.pop(stage, None)
            if settings.limit(stage) != 0:
                found[stage] = datasets
    if not found:
        return
    from raytrainer.data.ray import kept_or_streamed as ray_data
    from raytrainer.data.ray import prepared, spare_splitters

    for forget in (prepared.forget, spare_splitters.forget):
        idle_pool.when_none_idle(forget)
    ensure_ray(cluster, workers)
    _leave_a_cpu()
    remote = settings.strategy != "local"
    if remote and not all(ray_data.is_materialized(d) for datasets in found.values() for d in datasets):
        ray_data.require_free_cpu(workers)
    taken = 0
    for stage, datasets in found.items():
        task.datasets[stage] = []
        for dataset in datasets:
            blocks, size = ray_data.prepare(dataset, stage, remote, taken)
            taken += size
            task.datasets[stage].append(blocks)
    prepared.keep_only([source.dataset for datasets in found.values() for source in datasets])
