"""Local paths, where the working directory is gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny import Tiny, data

import raytrainer
from raytrainer.driver.cluster.session import Cluster, ensure_ray
from raytrainer.errors import ConfigurationError
from raytrainer.worker.actor.surroundings import Surroundings

USES = {
    "trainer": lambda: raytrainer.Trainer(),
    "folder of a trainer": lambda: raytrainer.Trainer(default_root_dir="x"),
    "checkpoints": lambda: raytrainer.ModelCheckpoint("x"),
    "a last checkpoint": lambda: raytrainer.OnExceptionCheckpoint("x"),
    "predictions": lambda: raytrainer.PredictionWriter("x"),
    "logger": lambda: raytrainer.CSVLogger("x"),
    "reading": lambda: Tiny.load_from_checkpoint("x/last.ckpt"),
    "export": lambda: raytrainer.export_weights("x.ckpt", "y"),
    "ray": lambda: ensure_ray(Cluster(), 2),
}


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """The working directory has been deleted."""
    torch.ones(2, 2) @ torch.ones(2, 2)  # MKL looks for itself when it is first used, and asks where it is
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError):
        os.getcwd()


@pytest.mark.parametrize("use", USES)
def test_what_is_relative_to_it_is_told(use, nowhere, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ConfigurationError, match=r"working directory has been deleted.*absolute path.*os\.chdir"):
        USES[use]()


def test_what_is_not_works(nowhere, local_trainer, tmp_path):
    trainer = local_trainer(max_epochs=1, callbacks=[raytrainer.ModelCheckpoint(tmp_path / "saved", save_last=True)])
    trainer.fit(Tiny(), data())
    assert Path(tmp_path, "saved", "last.ckpt", "meta.json").exists()
    surroundings = Surroundings.of_this_process()
    assert surroundings.folder == "" and all(map(os.path.isabs, surroundings.path))
