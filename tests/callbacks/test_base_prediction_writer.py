"""Each prediction reaches the user's own writer once, with the indices of its samples."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from raytrainer import BasePredictionWriter, ConfigurationError, Module


class Tenfold(Module):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return batch * 10


class Writer(BasePredictionWriter):
    def __init__(self, *args):
        super().__init__(*args)
        self.batches, self.epochs = [], []

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.batches.append((dataloader_idx, batch_idx, prediction.tolist(), batch_indices))

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        self.epochs.append((predictions, batch_indices))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("interval", ["batch", "epoch", "batch_and_epoch"])
def test_predictions_and_their_indices(interval, workers, local_trainer):
    """Also of a shuffled loader, one that takes no batches, and one that is cut short."""
    samples, options = [5, 6, 7, 8, 9], {"num_workers": workers if interval == "batch" else 0}
    loaders = [
        DataLoader(samples, 2, **options), DataLoader(samples, 3, shuffle=True, **options),
        DataLoader([torch.tensor([value]) for value in samples], batch_size=None, **options),
    ]  # fmt: skip
    writer = Writer(interval)
    trainer = local_trainer(callbacks=writer, limit_predict_batches=2)
    for _ in range(2):
        writer.batches.clear()
        trainer.predict(Tenfold(), loaders, return_predictions=False)
        if interval != "epoch":
            assert [entry[:2] for entry in writer.batches] == [(i, k) for i in range(3) for k in range(2)]
            for _, _, values, indices in writer.batches:
                assert values == [10 * samples[index] for index in indices]
    if interval != "batch":
        assert len(writer.epochs) == 2
        (predictions, indices) = writer.epochs[-1]
        assert [[len(batch) for batch in loader] for loader in predictions] == [[2, 2], [3, 2], [1, 1]]
        assert indices[0] == [[0, 1], [2, 3]] and indices[2] == [[0], [1]]


def test_one_loader_and_batches_without_indices(local_trainer):
    writer = Writer("batch_and_epoch")
    trainer = local_trainer(callbacks=writer)
    trainer.predict(Tenfold(), [[torch.tensor([1])]], return_predictions=False)
    assert writer.batches == [(0, 0, [10], None)]
    trainer.predict(Tenfold(), DataLoader([1, 2, 3], 2))
    (predictions, indices) = writer.epochs[-1]
    assert ([batch.tolist() for batch in predictions], indices) == ([[10, 20], [30]], [[[0, 1], [2]]])
    with pytest.raises(ConfigurationError, match=r"Writer\(write_interval\)='never'"):
        Writer("never")
