#!/usr/bin/env bash
# lightning 2.6.6: a run resumed from the checkpoint of an epoch's end has lost that epoch's step of ReduceLROnPlateau.
#
# Guess: a checkpoint that is saved once an epoch, after its validation, has all schedulers as they are when the next
# epoch begins. For those that are stepped without a metric that is so.
# Seen: a scheduler with a metric is stepped after checkpoints are saved, and nothing makes up for it on resuming. Its
# count of bad epochs is one behind for good, so that the rate goes down an epoch later than in the run that was not
# interrupted: each interruption trains with other rates, without a word.
#
# Run: findings/lightning_loses_a_plateau_step.sh    Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 lightning==2.6.6
FOLDER=$folder "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import os

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

logging.disable(logging.CRITICAL)
loader = DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2)


class Module(lightning.LightningModule):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind, self.rates = torch.nn.Linear(1, 1), kind, []

    def on_train_epoch_start(self):
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("score", 1.0)  # never gets better

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        if self.kind == "exponential":
            return [optimizer], [ExponentialLR(optimizer, 0.5)]
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "score"}}


def fit(kind, resumed=None):
    folder = os.path.join(os.environ["FOLDER"], kind, str(resumed is None))
    trainer = lightning.Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=[ModelCheckpoint(folder, monitor="score", save_top_k=-1, filename="{epoch}")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module(kind)
    trainer.fit(module, loader, loader, ckpt_path=resumed)
    return module.rates, os.path.join(folder, "epoch=1.ckpt")


for kind in ("exponential", "plateau"):
    rates, checkpoint = fit(kind)
    resumed, _ = fit(kind, checkpoint)
    print(f"{kind}: rates of epochs 2 to 5 are {rates[2:]}, and {resumed} in a run resumed at the end of epoch 1")
    assert (resumed == rates[2:]) is (kind == "exponential")
PYTHON
