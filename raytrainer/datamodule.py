"""`DataModule`: where the data comes from, in one reusable place."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Self

from torch.utils.data import DataLoader, Dataset, IterableDataset

from raytrainer.class_only import only_on_the_class
from raytrainer.data.data_hooks import DataHooks
from raytrainer.hparams import HyperparametersMixin
from raytrainer.short_repr import ShortRepr
from raytrainer.view.last_trainer import last_trainer

if TYPE_CHECKING:
    from raytrainer.checkpointing.places import CheckpointPath
    from raytrainer.view.trainer_view import TrainerView

__all__ = ["DataModule"]


class DataModule(ShortRepr, HyperparametersMixin, DataHooks):
    """Override `prepare_data`, `setup`, the `*_dataloader` hooks and, where needed, the transfer hooks.

    Loaders are built inside the workers.
    """

    @property
    def trainer(self) -> TrainerView | None:
        """The worker's view of the run while it lasts; after it, the driver's Trainer. None where there was none."""
        view: TrainerView | None = self.__dict__.get("_view") or last_trainer(self)
        return view

    @trainer.setter
    def trainer(self, view: TrainerView | None) -> None:
        self.__dict__["_view"] = view

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_view", "_trainer")}

    def state_dict(self) -> dict[str, Any]:
        """State to put into checkpoints: plain values and tensors. Taken from rank 0."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; called in every worker."""

    def on_exception(self, exception: BaseException) -> None:
        """Clean up after an error in this worker, of the module, of a callback or of the data.

        In the driver's process, also after any other of the run.
        """

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> Self:
        """A DataModule over datasets: a Dataset, a sequence of them, or a mapping of them, for each stage.

        Args:
            train_dataset: For training; shuffled unless it is an IterableDataset.
            val_dataset: For validation.
            test_dataset: For testing.
            predict_dataset: For prediction.
            batch_size: Samples per batch and worker.
            num_workers: Loader processes per worker.
            kwargs: Further arguments of `DataLoader`, and those of a derived class's `__init__` (which is given
                `batch_size` and `num_workers` too, if it takes them).
        """
        options = {"batch_size": batch_size, "num_workers": num_workers, **kwargs}
        own = {} if cls.__init__ is object.__init__ else inspect.signature(cls).parameters
        any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
        of_loaders = inspect.signature(DataLoader).parameters
        made = cls(
            **{name: value for name, value in options.items() if any_name or name in own or name not in of_loaders}
        )
        shared = ("batch_size", "num_workers")
        loading = {
            name: value for name, value in options.items() if name in of_loaders and (name not in own or name in shared)
        }
        given = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        for stage, dataset in given.items():
            if dataset is not None:
                setattr(made, f"{stage}_dataloader", partial(_loaders, dataset, stage == "train", loading))
        return made

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: CheckpointPath | IO[bytes],
        map_location: Any = "cpu",
        hparams_file: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        **overrides: Any,
    ) -> Self:
        """Construct the DataModule from the hyperparameters in a checkpoint, and load its state.

        Args:
            checkpoint_path: As for `Module.load_from_checkpoint`, like the others.
            map_location: Where to put tensors.
            hparams_file: A file to take hyperparameters from instead.
            weights_only: False: execute what a file of Lightning's asks for.
            overrides: Arguments for `__init__` that the checkpoint lacks or that shall differ.

        Raises:
            CheckpointError: No checkpoint, or not a readable one.
            ConfigurationError: An argument of `__init__` has no value.
        """
        from raytrainer.checkpointing.from_checkpoint import load_datamodule

        made: Self = load_datamodule(cls, checkpoint_path, map_location, hparams_file, weights_only, overrides)
        return made


def _loaders(datasets: Any, shuffle: bool, options: Mapping[str, Any]) -> Any:
    """A loader of each dataset."""

    def loader(dataset: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(dataset, shuffle=shuffle and not isinstance(dataset, IterableDataset), **options)

    if isinstance(datasets, Mapping):
        return {name: loader(dataset) for name, dataset in datasets.items()}
    if isinstance(datasets, Sequence) and not isinstance(datasets, Dataset):
        return [loader(dataset) for dataset in datasets]
    return loader(datasets)


only_on_the_class(DataModule, "load_from_checkpoint")
