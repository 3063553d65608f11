from __future__ import annotations

import contextlib
import errno
import io
import pickle
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import Tiny, data

from raytrainer.errors import ConfigurationError
from raytrainer.loggers.tensorboard import TensorBoardLogger

pytest.importorskip("tensorboardX")


def events(folder: str) -> Iterator[Any]:
    """All events of a folder. A record is its length (8 bytes), a checksum (4), the message, a checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(Path(folder).glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def scalars(folder: str) -> list[tuple[str, int, float]]:
    found = [
        (value.tag, event.step, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]
    return sorted(found)


def hyperparameters(folder: str) -> dict[str, Any]:
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    found: dict[str, Any] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.tag == "_hparams_/session_start_info":
                content = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                for name, item in content.session_start_info.hparams.items():
                    found[name] = getattr(item, item.WhichOneof("kind"))
    return found


def test_scalars_over_two_fits_in_the_same_second(tmp_path):
    logger = TensorBoardLogger(tmp_path, prefix="run")
    logger.log_metrics({"loss": 0.5, "epoch": 0}, step=3)
    logger.finalize("success")
    logger.log_rows([(4, {"loss": 0.25}), (5, {"loss": 0.125})])
    logger.log_metrics({"acc": 1.0})
    logger.finalize("success")
    assert logger.log_dir == f"{tmp_path}/logs/version_0"
    assert scalars(logger.log_dir) == [
        ("run-acc", 5, 1.0),
        ("run-epoch", 3, 0.0),
        ("run-loss", 3, 0.5),
        ("run-loss", 4, 0.25),
        ("run-loss", 5, 0.125),
    ]


def test_hyperparameters(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=True)
    params = {"lr": 0.1, "net": {"depth": 3, "bias": True}, "name": "x", "layers": [1, 2], "none": None}
    logger.log_hyperparams(params)
    logger.log_hyperparams(params)  # a second fit says nothing new
    logger.save()
    logger.finalize("success")
    found = hyperparameters(logger.log_dir)
    assert found == {"lr": 0.1, "net/depth": 3.0, "net/bias": True, "name": "x", "layers": "[1, 2]", "none": "None"}
    assert scalars(logger.log_dir) == [("hp_metric", 0, -1.0)]


def test_no_default_metric(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.finalize("success")
    assert hyperparameters(logger.log_dir) == {"lr": 0.1} and scalars(logger.log_dir) == []
    # with metrics of its own an experiment would show these alone, which here are none
    assert b"_hparams_/experiment" not in b"".join(f.read_bytes() for f in Path(logger.log_dir).iterdir())


def test_nothing_is_made_before_it_is_needed(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []
    assert logger.experiment is logger.experiment
    logger.finalize("success")


def test_a_copy_opens_its_own_file(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    copy = pickle.loads(pickle.dumps(logger))
    copy.log_metrics({"a": 2.0}, 2)
    for each in (logger, copy):
        each.finalize("success")
    assert scalars(logger.log_dir) == [("a", 1, 1.0), ("a", 2, 2.0)]


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigurationError, match=r"extra 'tensorboard'"):
        TensorBoardLogger(tmp_path)


def test_tensorboard_reads_it(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "net": {"width": 3}})
    logger.log_metrics({"loss": 0.5}, 3)
    picture = torch.zeros(3, 4, 6)
    picture[1] = 1.0
    logger.log_image("one", picture, step=4)
    logger.log_image("two", [picture, picture], step=5)
    logger.log_histogram("h", torch.tensor([[1.0, 2.0], [2.0, 4.0]]), step=6)
    logger.log_text("t", "*hello*", step=7)
    figures = pytest.importorskip("matplotlib.figure")
    logger.log_figure("drawn", figures.Figure(figsize=(2, 1), dpi=50), step=8)
    logger.finalize("success")
    reader = accumulator.EventAccumulator(logger.log_dir).Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [(3, 0.5)]
    assert "_hparams_/session_start_info" in reader.summary_metadata
    assert sorted(reader.Tags()["images"]) == ["drawn", "one", "two/0", "two/1"]
    (image,) = reader.Images("one")
    assert (image.step, image.width, image.height) == (4, 6, 4)
    pixels = Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")
    assert pixels.getpixel((0, 0)) == (0, 255, 0)
    assert (reader.Images("drawn")[0].step, reader.Images("drawn")[0].width) == (8, 100)
    (histogram,) = reader.Histograms("h")
    values = histogram.histogram_value
    assert (histogram.step, values.num, values.min, values.max, values.sum) == (6, 4.0, 1.0, 4.0, 9.0)
    (text,) = reader.Tensors("t/text_summary")
    assert text.step == 7 and text.tensor_proto.string_val == [b"*hello*"]


class _Full:
    """A file on a disk that takes so many more pieces, then none, until there is room again."""

    def __init__(self, file: Any, left: list[float]) -> None:
        self._file, self._left = file, left

    def write(self, data: bytes) -> None:
        self._left[0] -= 1
        if self._left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", range(0, 40, 3))
def test_a_full_disk_ends_no_run_and_keeps_nobody_waiting(room, local_trainer, tmp_path, monkeypatch, caplog):
    """Whenever it fills up: tensorboardX's thread ended with that, and the eleventh event waited for it for ever."""
    from tensorboardX import record_writer

    left = [float("inf")]
    opened = record_writer.open_file
    monkeypatch.setattr(record_writer, "open_file", lambda path: _Full(opened(path), left))

    class Logs(Tiny):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 1:
                left[0] = room
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    logger = TensorBoardLogger(tmp_path, version="mine")
    trainer = local_trainer(max_steps=30, max_epochs=-1, logger=logger, log_every_n_steps=1)
    trainer.fit(Logs(), data())
    assert trainer.global_step == 30
    assert "TensorBoardLogger failed, training goes on: OSError: [Errno 28] No space left on device" in caplog.text
    left[0] = float("inf")
    logger.log_metrics({"after": 1.0}, 31)
    logger.finalize("success")
    found = {path for path in Path(logger.log_dir).iterdir() if b"after" in path.read_bytes()}
    assert len(found) == 1  # in a file of its own, whose records are whole
    ((path, size),) = ((path, path.stat().st_size) for path in found)
    for other in set(Path(logger.log_dir).iterdir()) - found:
        other.unlink()
    assert scalars(logger.log_dir) == [("after", 31, 1.0)] and size == path.stat().st_size


@pytest.mark.parametrize("room", range(12))
def test_a_chart_of_several_curves_is_begun_on_a_full_disk(room, tmp_path, monkeypatch):
    """Each curve has a file and a thread of its own, whose first event may be the one that fails."""
    from tensorboardX import record_writer

    left = [float("inf")]
    opened = record_writer.open_file
    monkeypatch.setattr(record_writer, "open_file", lambda path: _Full(opened(path), left))
    logger = TensorBoardLogger(tmp_path, version="mine")
    logger.log_metrics({"before": 1.0}, 0)
    left[0] = room
    failed = []
    for step in range(30):
        try:
            logger.log_metrics({"chart": {"one": 1.0, "two": 2.0}}, step)
        except OSError as error:
            failed.append(error.errno)
    with contextlib.suppress(OSError):
        logger.finalize("success")
    assert set(failed) == {errno.ENOSPC}
    left[0] = float("inf")
    logger.log_metrics({"chart": {"one": 3.0}}, 31)
    logger.finalize("success")
    folder = Path(logger.log_dir) / "chart" / "one"
    assert any(b"chart" in path.read_bytes() for path in folder.iterdir())
