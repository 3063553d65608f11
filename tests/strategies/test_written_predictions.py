"""Several workers write each prediction once, with the indices of its samples."""

from __future__ import annotations

import json

import pytest
from torch.utils.data import DataLoader

from raytrainer import BasePredictionWriter, ModelParallel, Module, PredictionWriter


class Tenfold(Module):
    def predict_step(self, batch, batch_idx):
        return batch * 10


class Lines(BasePredictionWriter):
    """A file a worker, with a line a batch, and one of them all."""

    def __init__(self, folder):
        super().__init__("batch_and_epoch")
        self.folder = folder

    def write(self, trainer, name, *what):
        with open(self.folder / f"{name}-{trainer.global_rank}", "a") as file:
            file.write(json.dumps(what) + "\n")

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.write(trainer, "batch", batch_indices, prediction.tolist())

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        self.write(trainer, "all", batch_indices[0], [prediction.tolist() for prediction in predictions])


@pytest.mark.parametrize("strategy", ["ddp", "dp", ModelParallel(tensor=2)], ids=["ddp", "dp", "split layers"])
def test_each_sample_once(strategy, forked, tmp_path):
    samples = list(range(100, 111))
    folder = tmp_path / "written"
    folder.mkdir()
    (folder / "batch-1").touch()  # of workers that predict the same, the second has no batches
    trainer = forked(strategy=strategy, callbacks=Lines(folder))
    trainer.predict(Tenfold(), DataLoader(samples, 3, shuffle=True), return_predictions=False)
    rows = []
    for rank in range(2):
        batches = [json.loads(line) for line in (folder / f"batch-{rank}").read_text().splitlines()]
        assert [[[indices for indices, _ in batches], [values for _, values in batches]]] == [
            json.loads(line) for line in (folder / f"all-{rank}").read_text().splitlines()
        ]
        rows += [row for indices, values in batches for row in zip(indices, values, strict=True)]
    assert sorted(rows) == [(index, 10 * value) for index, value in enumerate(samples)]


@pytest.mark.parametrize("interval", ["batch", "epoch"])
def test_of_workers_that_predict_the_same_one_writes(interval, forked, tmp_path):
    pytest.importorskip("pyarrow")
    samples = list(range(100, 111))
    writer = PredictionWriter(tmp_path / "rows", interval)
    trainer = forked(strategy=ModelParallel(tensor=2), callbacks=writer)
    trainer.predict(Tenfold(), DataLoader(samples, 3), return_predictions=False)
    found = PredictionWriter.read(tmp_path / "rows")["prediction"].to_pylist()
    assert found == [10 * value for value in samples]
