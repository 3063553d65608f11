"""Checkpoints that Lightning 2.6 has written (`lightning_files/make.py`): read without it, and gone on from."""

from __future__ import annotations

import argparse
import io
import pathlib
import pickle
from typing import ClassVar

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from raytrainer import Callback, CheckpointError, ConfigurationError, DataModule, EarlyStopping, Module
from raytrainer.hparams import AttributeDict

FILES = pathlib.Path(__file__).parent / "lightning_files"


def loader():
    return DataLoader(TensorDataset(torch.arange(48.0).reshape(12, 4) / 100), 2)


class Net(Module):
    def __init__(self, lr=0.1, options=None, where=pathlib.Path("a"), scale=1.0, unused=None):
        super().__init__()
        self.save_hyperparameters(ignore="unused")
        self.layer = torch.nn.Linear(4, 1)
        self.rates = []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("v", self.layer(batch[0]).pow(2).mean())

    def test_step(self, batch, batch_idx):
        self.log("w", self.layer.weight.sum())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Data(DataModule):
    def __init__(self, conf):
        super().__init__()
        self.save_hyperparameters(conf)
        self.conf, self.loaded = conf, None

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader()

    def load_state_dict(self, state_dict):
        self.loaded = state_dict


class Own(Callback):
    epochs = 0

    def on_train_epoch_end(self, trainer, module):
        self.epochs += 1

    def load_state_dict(self, state_dict):
        self.epochs = state_dict["epochs"]

    def state_dict(self):
        return {"epochs": self.epochs}


def weights(name):
    return Net.load_from_checkpoint(FILES / f"{name}.ckpt").state_dict()


def test_weights_and_hyperparameters():
    net = Net.load_from_checkpoint(FILES / "end.ckpt")
    options = argparse.Namespace(names=["a"], deep=argparse.Namespace(x=1))
    assert net.hparams == {"lr": 0.2, "options": options, "where": pathlib.Path("a"), "scale": 2.0}
    assert type(net.hparams.scale) is numpy.float64 and net.layer.weight.abs().sum() > 0
    with open(FILES / "end.ckpt", "rb") as file:
        again = Net.load_from_checkpoint(file, lr=0.5, map_location="cpu")
    assert again.hparams.lr == 0.5 and torch.equal(again.layer.weight, net.layer.weight)


def test_a_datamodule_with_one_argument():
    data = Data.load_from_checkpoint(FILES / "end.ckpt")
    assert data.conf == AttributeDict(size=2) and data.hparams.size == 2 and data.loaded == {"seen": 3}


@pytest.mark.parametrize(("name", "steps"), [("epoch", 12), ("within", 8), ("end", 24)])
def test_a_run_goes_on_as_it_would_have_there(name, steps, local_trainer, caplog):
    net, data, own, stopping = Net(0.2), Data({"size": 2}), Own(), EarlyStopping("v", patience=9)
    trainer = local_trainer(max_epochs=4, callbacks=[own, stopping])
    trainer.fit(net, datamodule=data, ckpt_path=FILES / f"{name}.ckpt")
    assert (trainer.global_step, trainer.current_epoch) == (24, 4)
    assert net.rates == [0.2 / 2 ** (step // 6) for step in range(steps, 24)]
    for key, tensor in weights("end").items():
        # but for the last bits, which are another CPU's
        torch.testing.assert_close(net.state_dict()[key], tensor, rtol=1e-5, atol=1e-7)
    assert data.loaded == {"seen": 3} and own.epochs == 4
    assert trainer.ckpt_path == str(FILES / f"{name}.ckpt")
    assert "is a checkpoint of Lightning 2.6.6: going on with its weights, 1 optimizer(s), 1 scheduler(s), epoch " in (
        caplog.text
    )
    assert "Left out: " in caplog.text and "the state of ModelCheckpoint" in caplog.text
    assert ("its order, if it is shuffled" in caplog.text) == (name == "within")


def test_early_stopping_goes_on_waiting(local_trainer):
    stopping = EarlyStopping("v", patience=9)

    class Looking(Net):
        def on_train_start(self):
            self.waited = stopping.wait_count, float(stopping.best_score)

    local_trainer(max_epochs=4, callbacks=stopping).fit(
        net := Looking(0.2), datamodule=Data({}), ckpt_path=FILES / "epoch.ckpt"
    )
    saved = torch.load(FILES / "epoch.ckpt", weights_only=False)["callbacks"][
        "EarlyStopping{'monitor': 'v', 'mode': 'min'}"
    ]
    assert net.waited == (saved["wait_count"], float(saved["best_score"])) and stopping.patience == 9


def test_evaluation_reads_it(local_trainer):
    trainer = local_trainer()
    (found,) = trainer.test(Net(), loader(), ckpt_path=FILES / "end.ckpt", verbose=False)
    assert found["w"] == pytest.approx(float(weights("end")["layer.weight"].sum()))


def test_other_optimizers_are_told_apart(local_trainer):
    class Two(Net):
        def configure_optimizers(self):
            return [torch.optim.SGD([parameter], 0.1) for parameter in self.parameters()]

    with pytest.raises(CheckpointError, match=r"has 1 optimizers, configure_optimizers\(\) gives 2"):
        local_trainer(max_epochs=4).fit(Two(), loader(), ckpt_path=FILES / "epoch.ckpt")


def rewritten(tmp_path, **changes):
    content = torch.load(FILES / "epoch.ckpt", weights_only=False)
    torch.save({name: value for name, value in (content | changes).items() if value is not None}, tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def test_weights_alone_cannot_be_gone_on_from(local_trainer, tmp_path):
    path = rewritten(tmp_path, optimizer_states=None, lr_schedulers=None, loops=None, callbacks=None)
    assert isinstance(Net.load_from_checkpoint(path), Net)
    with pytest.raises(CheckpointError, match="holds weights only"):
        local_trainer(max_epochs=4).fit(Net(), loader(), ckpt_path=path)


class Evil:
    ran: ClassVar[list[int]] = []

    def __reduce__(self):
        return Evil.ran.append, (1,)


class Harmless:
    def __eq__(self, other):
        return type(other) is Harmless


@pytest.mark.parametrize("value", [Evil(), Harmless()])
def test_nothing_in_a_file_is_executed_unasked(value, tmp_path, local_trainer):
    path = rewritten(tmp_path, hyper_parameters={"options": value})
    Evil.ran.clear()
    with pytest.raises(CheckpointError, match=r"it holds [\w.]+\. .*add_safe_globals.*weights_only=False"):
        Net.load_from_checkpoint(path)
    with pytest.raises(CheckpointError, match="add_safe_globals"):
        local_trainer().test(Net(), loader(), ckpt_path=path, verbose=False)
    assert not Evil.ran
    if isinstance(value, Harmless):
        assert Net.load_from_checkpoint(path, weights_only=False).hparams.options == value
        local_trainer().test(Net(), loader(), ckpt_path=path, verbose=False, weights_only=False)
        with torch.serialization.safe_globals([Harmless]):
            assert Net.load_from_checkpoint(path).hparams.options == value


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"PK no zip", "no checkpoint there"),
        (b"", "no checkpoint there"),
        (pickle.dumps({"state_dict": {}}), "no checkpoint there"),
        ({"weights": torch.ones(1)}, "it has no state_dict"),
        (torch.ones(1), "it has no state_dict"),
    ],
)
def test_what_is_no_checkpoint(content, told, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "x.ckpt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "x.ckpt")
    for source in (tmp_path / "x.ckpt", io.BytesIO((tmp_path / "x.ckpt").read_bytes())):
        with pytest.raises(CheckpointError, match=told):
            Net.load_from_checkpoint(source)


@pytest.mark.parametrize("address", ["https://example.org/x.ckpt", "ftp://example.org/x.ckpt"])
def test_addresses_that_nothing_is_read_from(address, local_trainer):
    told = r"https.*fetch it first" if address.startswith("https") else "ftp.*may be on local paths"
    for use in (
        Net.load_from_checkpoint,
        lambda path: local_trainer(max_epochs=1).fit(Net(), loader(), ckpt_path=path),
    ):
        with pytest.raises(ConfigurationError, match=told):
            use(address)
