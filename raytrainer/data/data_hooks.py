"""The data hooks that a Module and a DataModule share."""

from __future__ import annotations

from typing import Any

import torch

from raytrainer.data.transfer import move

__all__ = ["DataHooks"]


class DataHooks:
    """Where batches come from and how they get to the device. A DataModule's hooks win over the Module's."""

    def prepare_data(self) -> None:
        """Download or convert data. Runs once a node, before `setup`; set no state here."""

    def setup(self, stage: str) -> None:
        """Build datasets. Runs in every worker; `stage` is "fit", "validate", "test" or "predict"."""

    def teardown(self, stage: str) -> None:
        """Clean up after a stage. Runs in every worker."""

    def train_dataloader(self) -> Any:
        """Return the training loader: a DataLoader, or any iterable of batches."""
        raise NotImplementedError

    def val_dataloader(self) -> Any:
        """Return the validation loader, or a list of them."""
        raise NotImplementedError

    def test_dataloader(self) -> Any:
        """Return the test loader, or a list of them."""
        raise NotImplementedError

    def predict_dataloader(self) -> Any:
        """Return the prediction loader, or a list of them."""
        raise NotImplementedError

    def train_dataset(self) -> Any:
        """Return the training data as a `RayDataset` (or a `ray.data.Dataset`), instead of a `train_dataloader`.

        Unlike the loader hooks, this and its siblings run on the driver, before the workers' `prepare_data` and
        `setup`; Ray is running by then.
        """
        raise NotImplementedError

    def val_dataset(self) -> Any:
        """Return the validation data as a `RayDataset`, or a list of them; None: no validation."""
        raise NotImplementedError

    def test_dataset(self) -> Any:
        """Return the test data as a `RayDataset`, or a list of them."""
        raise NotImplementedError

    def predict_dataset(self) -> Any:
        """Return the data to predict as a `RayDataset`; `Trainer.predict` then returns a `ray.data.Dataset`."""
        raise NotImplementedError

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch before it moves to the device; return it."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the device; by default every tensor in any nesting and every object with `.to`."""
        return move(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch when it is on the device; return it."""
        return batch
