from __future__ import annotations

import pytest
import torch
from exact import Died, Exact, run, same
from tiny import Tiny, data

from raytrainer import ConfigurationError, EMAWeightAveraging, OnExceptionCheckpoint
from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.checkpointing.places import checkpoint_exists


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    module = Exact()
    _, rows = run(module, tmp_path_factory.mktemp("calm"), num_workers=1)
    return module, rows


@pytest.mark.parametrize("batches", [0, 3, 18, 28])
def test_training_goes_on_from_where_it_failed(batches, undisturbed, tmp_path):
    """Within a chunk and in the middle of an accumulation too; the failing batch has drawn nothing at random here."""
    calm, rows = undisturbed
    saving = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(Died):
        run(Exact((0, batches), flag=f"{tmp_path}/flag"), tmp_path, callbacks=[saving], num_workers=1)
    module = Exact()
    _, resumed = run(module, tmp_path, ckpt_path=saving.ckpt_path, num_workers=1)
    assert same(module, calm)
    assert read_checkpoint(saving.ckpt_path)["progress"]["total_batches"] == batches
    final = [row for _, row in rows if row["epoch"] == 2 and "loss_epoch" in row]
    assert [row for _, row in resumed if row["epoch"] == 2 and "loss_epoch" in row] == final


def test_a_validation_that_failed_is_repeated(tmp_path):
    saving = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(Died):
        run(Exact((0, 21), flag=f"{tmp_path}/flag", verb="validate"), tmp_path, callbacks=[saving])
    _, rows = run(Exact(), tmp_path, ckpt_path=saving.ckpt_path)
    assert [step for step, row in rows if "val_loss" in row] == [10, 13, 17, 20]


def test_averaged_weights_are_taken_out_first(tmp_path, local_trainer):
    class Fails(Tiny):
        def validation_step(self, batch, batch_idx):
            raise ArithmeticError

    saving, module = OnExceptionCheckpoint(tmp_path, "failed"), Fails()
    trainer = local_trainer(max_epochs=1, callbacks=[EMAWeightAveraging(0.5), saving], num_sanity_val_steps=0)
    with pytest.raises(ArithmeticError):
        trainer.fit(module, data(), data(2))
    saved = read_checkpoint(tmp_path / "failed.ckpt")
    assert torch.equal(saved["worker_callbacks"]["EMAWeightAveraging"]["current"]["layer.weight"], module.layer.weight)
    assert not torch.equal(saved["state_dict"]["layer.weight"], module.layer.weight)


def test_only_fit_saves_and_the_error_stays(tmp_path, local_trainer, caplog, monkeypatch):
    monkeypatch.setattr(__import__("logging").getLogger("raytrainer"), "propagate", True)

    class Fails(Tiny):
        def test_step(self, batch, batch_idx):
            raise ArithmeticError

        def training_step(self, batch, batch_idx):
            self.lock = object()
            raise ArithmeticError("the first")

        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = object()

    saving = OnExceptionCheckpoint(tmp_path / "c")
    trainer = local_trainer(max_epochs=1, callbacks=saving)
    with pytest.raises(ArithmeticError):
        trainer.test(Fails(), data())
    with pytest.raises(ArithmeticError, match="the first"):
        trainer.fit(Fails(), data())
    assert "could not save" in caplog.text and not checkpoint_exists(saving.ckpt_path)
    with pytest.raises(ConfigurationError, match="filename"):
        OnExceptionCheckpoint(tmp_path, "")


def test_what_failed_before_training_saves_nothing(tmp_path):
    """The workers have not taken up the checkpoint yet: saved, they would replace it with fresh weights."""

    class Unlucky(Exact):
        def setup(self, stage):
            raise ArithmeticError

    saving = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(Died):
        run(Exact((0, 18), flag=f"{tmp_path}/flag"), tmp_path, callbacks=[saving])
    with pytest.raises(ArithmeticError):
        run(Unlucky(), tmp_path, callbacks=[saving], ckpt_path=saving.ckpt_path)
    assert read_checkpoint(saving.ckpt_path)["progress"]["total_batches"] == 18
