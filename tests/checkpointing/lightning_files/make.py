"""Makes the checkpoints in this folder with Lightning, which need not be installed for the tests: `python make.py`.

`epoch.ckpt` is from the end of the second epoch of four, `within.ckpt` from its middle, `end.ckpt` from after `fit`.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import lightning
import numpy
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

HERE = pathlib.Path(__file__).parent


def loader():
    return DataLoader(TensorDataset(torch.arange(48.0).reshape(12, 4) / 100), 2)


class Own(lightning.Callback):
    epochs = 0

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs += 1

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict):
        self.epochs = state_dict["epochs"]


class Data(lightning.LightningDataModule):
    def __init__(self, conf):
        super().__init__()
        self.save_hyperparameters(conf)

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader()

    def state_dict(self):
        return {"seen": 3}


class Net(lightning.LightningModule):
    def __init__(self, lr=0.1, options=None, where=pathlib.Path("a"), scale=1.0, unused=None):
        super().__init__()
        self.save_hyperparameters(ignore="unused")
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("v", self.layer(batch[0]).pow(2).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def main():
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=2)
        epochs = ModelCheckpoint(
            folder, filename="epoch={epoch}", save_top_k=-1, monitor="v", auto_insert_metric_name=False
        )
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=4, logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[saver, epochs, EarlyStopping("v", patience=9), Own()],
        )  # fmt: skip
        options = argparse.Namespace(names=["a"], deep=argparse.Namespace(x=1))
        trainer.fit(Net(0.2, options, scale=numpy.float64(2)), datamodule=Data({"size": 2}))
        trainer.save_checkpoint(HERE / "end.ckpt")
        for name, source in (("epoch", "epoch=1"), ("within", "step=8")):
            (HERE / f"{name}.ckpt").write_bytes((pathlib.Path(folder) / f"{source}.ckpt").read_bytes())


if __name__ == "__main__":
    main()
