from __future__ import annotations

import errno
import os

import pyarrow.parquet as pq
import pytest
import torch
from tiny import Tiny, data

from raytrainer import ConfigurationError, DataError, PredictionWriter
from raytrainer.callbacks import prediction_writer
from raytrainer.errors import StorageError


class Several(Tiny):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx == 1 and batch_idx == 0:
            return None
        y = self(batch[0])
        return {"y": y, "best": y.argmax(1), "half": y.bfloat16()[:, 0], "name": [f"n{len(y)}"] * len(y)}


class First(Tiny):
    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@pytest.mark.parametrize("interval", ["epoch", "batch"])
def test_what_comes_back_is_what_was_predicted(interval, tmp_path, local_trainer, monkeypatch):
    monkeypatch.setattr(prediction_writer, "_GROUP_BYTES", 100)
    module, loaders = Several(), [data(7, 2), data(6, 3, seed=2)]
    trainer = local_trainer(callbacks=PredictionWriter(tmp_path / "p", interval))
    outputs = [o for of_loader in trainer.predict(module, loaders) for o in of_loader if o is not None]
    table = PredictionWriter.read(tmp_path / "p")
    expected = torch.cat([o["y"] for o in outputs])
    torch.testing.assert_close(torch.tensor(table["y"].to_pylist()), expected)
    assert table["best"].to_pylist() == expected.argmax(1).tolist()
    assert table["half"].to_pylist() == expected.bfloat16()[:, 0].tolist()
    assert table["name"].to_pylist() == ["n2"] * 6 + ["n1"] + ["n3"] * 3
    assert table["dataloader_idx"].to_pylist() == [0] * 7 + [1] * 3
    assert table["batch_idx"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 1, 1, 1]
    files = sorted(path.name for path in (tmp_path / "p").iterdir())
    if interval == "epoch":
        assert files == ["part-00000.parquet"]
        assert pq.ParquetFile(tmp_path / "p" / files[0]).num_row_groups > 1
    else:
        assert files == [f"part-00000-0-{i:06d}.parquet" for i in range(4)] + ["part-00000-1-000001.parquet"]


def test_tensors_of_several_dimensions(tmp_path, local_trainer):
    class Cubes(Tiny):
        def predict_step(self, batch, batch_idx):
            return batch[0].reshape(-1, 2, 2), batch[1][:, 0].to(torch.float16)

    local_trainer(callbacks=PredictionWriter(tmp_path)).predict(Cubes(), data(5), return_predictions=False)
    table, (x, y) = PredictionWriter.read(tmp_path), next(iter(data(5, 5)))
    torch.testing.assert_close(torch.tensor(table["prediction_0"].to_pylist()), x.reshape(5, 2, 2))
    assert table["prediction_1"].to_pylist() == y[:, 0].half().tolist()


def test_files_that_are_there(tmp_path, local_trainer):
    (tmp_path / "part-00007.parquet").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="part-00007"):
        local_trainer(callbacks=PredictionWriter(tmp_path)).predict(First(), data(4))
    (tmp_path / "notes.txt").touch()
    local_trainer(callbacks=PredictionWriter(tmp_path, overwrite=True)).predict(First(), data(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "part-00000.parquet"]


@pytest.mark.parametrize("output", [torch.tensor(1.0), {"row_idx": torch.ones(2)}, {"a": torch.ones(2), "b": [1]}])
def test_outputs_that_are_no_rows(output, tmp_path, local_trainer):
    module = Tiny()
    module.predict_step = lambda batch, batch_idx: output
    with pytest.raises(DataError, match="predict_step returned"):
        local_trainer(callbacks=PredictionWriter(tmp_path)).predict(module, data(2))


def test_fsspec(local_trainer):
    pytest.importorskip("fsspec")
    uri = "fsspec+memory:///folder/predictions"
    outputs = local_trainer(callbacks=PredictionWriter(uri, overwrite=True)).predict(First(), data(4))
    assert PredictionWriter.read(uri)["prediction"].to_pylist() == torch.cat(outputs).tolist()


def test_bad_interval():
    with pytest.raises(ConfigurationError, match="write_interval"):
        PredictionWriter("x", "step")


@pytest.mark.parametrize("interval", ["epoch", "batch"])
@pytest.mark.parametrize("call", ["write_table", "close"])
def test_a_file_that_cannot_be_written_is_named_and_removed(call, interval, tmp_path, local_trainer, monkeypatch):
    def full(self, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq.ParquetWriter, call, full)
    writer = PredictionWriter(tmp_path, write_interval=interval)
    with pytest.raises(
        StorageError, match=r"part-00000.*\.parquet: the predictions cannot be written: .*No space left"
    ):
        local_trainer(callbacks=writer).predict(First(), data(8), return_predictions=False)
    assert list(tmp_path.iterdir()) == []
