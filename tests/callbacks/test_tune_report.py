from __future__ import annotations

import errno
import logging

import pytest
from ray import tune  # here, since it sets environment variables, which no test may do
from tiny import Tiny, data

from raytrainer import ConfigurationError, TuneReportCallback, tune_resources
from raytrainer.callbacks import ray_tune
from raytrainer.errors import StorageError


@pytest.fixture
def reported(monkeypatch):
    """What the callback reports, with whether there was a checkpoint."""
    from raytrainer.callbacks import ray_tune

    reports = []
    monkeypatch.setattr(ray_tune, "_in_trial", lambda: True)
    monkeypatch.setattr(tune, "report", lambda metrics, checkpoint=None: reports.append((metrics, checkpoint)))
    return reports


def fit(trainer, callback, epochs=1, **metrics):
    callback.setup(trainer, None, "fit")
    for _ in range(epochs):
        trainer.epoch(callback, train={"loss": 0.25}, val=metrics or None)


def test_after_each_epoch_with_a_validation(local_trainer, reported):
    class Both(Tiny):
        def training_step(self, batch, batch_idx):
            self.log("train_loss", float(self.current_epoch), on_epoch=True, on_step=False)
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))

    def reports(on=None, **options):
        reported.clear()
        callback = TuneReportCallback(["train_loss", "val_loss"], on, checkpoint=False)
        local_trainer(max_epochs=4, callbacks=callback, **options).fit(Both(), data(8), data(4))
        return [tuple(metrics.values()) for metrics, _ in reported]

    epochs = [(e, 4 * e + 4, e, e) for e in range(4)]
    assert reports() == reports(val_check_interval=2) == epochs
    assert reports(check_val_every_n_epoch=2) == epochs[1::2]
    # what is named is waited for, and no scheduler judges a value twice
    assert reports(on="train_epoch_end", check_val_every_n_epoch=2) == epochs[1::2]
    assert reports(on="train_epoch_end") == epochs


def test_training_values_right_after_a_validation_are_those_of_the_epoch_before(trainer, reported):
    fit(trainer, TuneReportCallback(on="validation_end", checkpoint=False), epochs=2, val_loss=0.5)
    assert reported == [
        ({"epoch": 0, "step": 10, "val_loss": 0.5}, None),
        ({"epoch": 1, "step": 20, "loss": 0.25, "val_loss": 0.5}, None),
    ]
    trainer.callback_metrics.clear()
    with pytest.raises(ConfigurationError, match='on="train_epoch_end"'):
        fit(trainer, TuneReportCallback("loss", on="validation_end"), val_loss=0.5)


def test_after_each_epoch_where_there_is_no_validation(trainer, reported):
    trainer.num_val_batches = []
    fit(trainer, TuneReportCallback(checkpoint=False))
    assert reported == [({"epoch": 0, "step": 10, "loss": 0.25}, None)]


def test_moment_and_names_can_be_chosen(trainer, reported):
    fit(trainer, TuneReportCallback({"best": "val_loss"}, on="train_epoch_end", checkpoint=False), val_loss=0.5)
    fit(trainer, TuneReportCallback("val_loss", checkpoint=False), val_loss=0.5)
    assert [metrics for metrics, _ in reported] == [
        {"epoch": 0, "step": 10, "best": 0.5},
        {"epoch": 1, "step": 20, "val_loss": 0.5},
    ]
    with pytest.raises(ConfigurationError, match=r"\['acc'\] was not logged; there are: loss, val_loss"):
        fit(trainer, TuneReportCallback("acc"), val_loss=0.5)
    with pytest.raises(ConfigurationError, match="'fit_end'"):
        TuneReportCallback(on="fit_end")


def test_not_in_the_sanity_check(trainer, reported):
    callback = TuneReportCallback(checkpoint=False)
    callback.setup(trainer, None, "fit")
    trainer.sanity_checking = True
    trainer.validate(callback, val_loss=0.5)
    assert reported == []


def test_a_folder_that_cannot_be_deleted_ends_no_trial(local_trainer, reported, monkeypatch, tmp_path, caplog):
    """Tune has taken its copy by then."""
    monkeypatch.setattr(ray_tune.tempfile, "tempdir", str(tmp_path))

    def refused(folder):
        raise OSError(errno.EIO, "Input/output error", folder)

    monkeypatch.setattr(ray_tune.shutil, "rmtree", refused)
    with caplog.at_level(logging.WARNING, "raytrainer"):
        local_trainer(max_epochs=1, callbacks=TuneReportCallback()).fit(Tiny(), data(4))
    assert len(reported) == 1 and "for Tune, cannot be deleted: [Errno 5] Input/output error" in caplog.text


def test_no_room_for_a_report_s_checkpoint(local_trainer, reported, monkeypatch, tmp_path):
    monkeypatch.setattr(ray_tune.tempfile, "tempdir", str(tmp_path / "full"))
    with pytest.raises(StorageError, match=r"TuneReportCallback makes a checkpoint .*full.*Set TMPDIR"):
        local_trainer(max_epochs=1, callbacks=TuneReportCallback()).fit(Tiny(), data(4))
    assert reported == []


def test_outside_of_a_trial(local_trainer, caplog):
    with caplog.at_level(logging.WARNING, "raytrainer"):
        local_trainer(max_epochs=1, callbacks=TuneReportCallback()).fit(Tiny(), data(4))
    assert "this is no trial of Ray Tune" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "bundles", "strategy"),
    [
        ({}, [{"CPU": 1}], "PACK"),
        ({"gpus": 1}, [{"CPU": 1, "GPU": 1}], "PACK"),
        ({"num_processes": 2}, [{}, {"CPU": 2}], "PACK"),
        ({"gpus": 4, "num_nodes": 2}, [{}, {"CPU": 4, "GPU": 4}, {"CPU": 4, "GPU": 4}], "STRICT_SPREAD"),
    ],
)
def test_resources_of_a_trial(arguments, bundles, strategy):
    factory = tune_resources(**arguments)
    head = {} if factory.head_bundle_is_empty else None
    assert ([head] if head is not None else []) + factory.bundles == bundles
    assert factory.strategy == strategy


@pytest.mark.parametrize(
    "arguments",
    [{"num_processes": 0}, {"gpus": -1}, {"gpus": "2"}, {"num_nodes": 1.0}, {"num_processes": 2, "gpus": 2}],
)
def test_resources_that_cannot_be(arguments):
    with pytest.raises(ConfigurationError, match=r"tune_resources\("):
        tune_resources(**arguments)
