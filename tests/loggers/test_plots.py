from __future__ import annotations

import builtins
import io

import pytest

from raytrainer import ConfigurationError, CSVLogger
from raytrainer.loggers._plots import group_names, split_runs


@pytest.fixture
def logger(tmp_path) -> CSVLogger:
    logger = CSVLogger(tmp_path)
    for step in range(10):
        logger.log_metrics({"train_loss": 1.0 / (step + 1), "epoch": step // 5}, step)
        if step % 5 == 4:
            logger.log_metrics({"val_loss": 2.0 / (step + 1), "val_acc": step / 10, "epoch": step // 5}, step)
    return logger


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["train_loss", "lr-Adam", "val_loss"], {"loss": ["train_loss", "val_loss"], "lr-Adam": ["lr-Adam"]}),
        (["loss_step", "loss_epoch", "loss/val"], {"loss": ["loss_step", "loss_epoch", "loss/val"]}),
        (["val_acc/dataloader_idx_0", "val_acc/dataloader_idx_1"], None),
        (["gpu_memory/node0-gpu0", "gpu_memory/node1-gpu3"], None),
        (["gpu_memory/min", "gpu_memory/max"], None),
        (["training/f1", "valid/f1", "test/f1"], None),
        (["loss", "mse"], {"loss": ["loss"], "mse": ["mse"]}),
        (["train", "trained"], {"train": ["train"], "trained": ["trained"]}),
    ],
)
def test_what_belongs_together_shares_an_axis(names, groups):
    found = group_names(names)
    assert list(found.values()) == ([names] if groups is None else list(groups.values()))
    assert groups is None or found == groups


def test_runs_begin_where_the_step_goes_back():
    points = [(0, 1.0), (4, 2.0), (4, 3.0), (1, 4.0), (2, 5.0)]
    assert split_runs(points) == [points[:3], points[3:]]
    assert split_runs([]) == []


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_a_figure_of_what_was_logged(logger):
    figure = logger.plot()
    loss, accuracy = figure.axes
    assert [loss.get_title(), accuracy.get_title()] == ["loss", "val_acc"]
    drawn = lines(loss)
    assert drawn["train_loss"] == [(step, pytest.approx(1.0 / (step + 1))) for step in range(10)]
    assert drawn["val_loss"] == [(4, 0.4), (9, 0.2)]
    assert lines(accuracy) == {"val_acc": [(4, 0.4), (9, 0.9)]}
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train_loss", "val_loss"]
    saved = io.BytesIO()
    figure.savefig(saved)
    for png in (saved.getvalue(), figure._repr_png_()):
        assert png.startswith(b"\x89PNG") and len(png) > 5000


def test_chosen_names(logger):
    assert [axes.get_title() for axes in logger.plot(["val_acc", "train_loss"]).axes] == ["val_acc", "train_loss"]
    (axes,) = logger.plot("loss").axes
    assert set(lines(axes)) == {"train_loss", "val_loss"}
    with pytest.raises(ConfigurationError, match=r"no 'f1' in .*there are: train_loss, val_loss, val_acc"):
        logger.plot("f1")


def test_an_earlier_run_is_pale(logger):
    logger.log_metrics({"val_acc": 0.3}, 2)
    (axes,) = logger.plot("val_acc").axes
    earlier, last = axes.lines
    assert earlier.get_alpha() < last.get_alpha() == 1.0
    assert earlier.get_color() == last.get_color()
    assert list(last.get_xdata()) == [2]


def test_values_that_are_no_numbers_leave_a_gap(logger):
    logger.log_metrics({"val_acc": float("nan")}, 12)
    logger.log_metrics({"val_acc": "n/a"}, 13)
    (axes,) = logger.plot("val_acc").axes
    assert list(axes.lines[0].get_xdata()) == [4, 9, 12]


def test_a_trainer_plots_its_csv_logger(local_trainer, tmp_path):
    with pytest.raises(ConfigurationError, match="CSVLogger"):
        local_trainer().plot()
    with pytest.raises(ConfigurationError, match="nothing has been logged"):
        local_trainer(logger=CSVLogger(tmp_path)).plot()
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    assert [axes.get_title() for axes in local_trainer(logger=[logger]).plot().axes] == ["loss"]


def test_without_matplotlib(logger, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **options):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigurationError, match=r"extra 'plot'"):
        logger.plot()
