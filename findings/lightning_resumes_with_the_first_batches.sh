#!/usr/bin/env bash
# lightning 2.6.6: a run resumed in the middle of an epoch counts on, and reads its data from the beginning.
#
# Guess: batch 3 of the epoch is read after batch 2, as its number says; or the epoch is begun again, all of it.
# Seen: `batch_idx` goes on at 3 with the rows of batch 0. The epoch ends after its 5 batches, so that it has seen the
# first rows twice and the last ones not at all, and weights are others than those of the run that was not interrupted.
# `on_train_epoch_start` is not called for it, `on_train_epoch_end` is. A checkpoint of the very end of the epoch, saved
# by steps, resumes with the right rows, but its next epoch has no `on_train_epoch_start` either.
#
# Run: findings/lightning_resumes_with_the_first_batches.sh    Fails if this changes.
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
from torch.utils.data import DataLoader, TensorDataset

logging.disable(logging.CRITICAL)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.began = [], []

    def on_train_epoch_start(self):
        self.began.append(self.current_epoch)

    def training_step(self, batch, batch_idx):
        rows = batch[0].flatten().tolist()
        self.seen.append((self.current_epoch, batch_idx, rows))
        return self.layer(batch[0] / 20).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(steps, resumed=None):
    folder = os.path.join(os.environ["FOLDER"], f"{steps}-{bool(resumed)}")
    module = Module()
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=steps, save_top_k=-1, filename="{step}")
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.arange(20.0)[:, None]), batch_size=4), ckpt_path=resumed)
    return module, os.path.join(folder, f"step={steps}.ckpt")


for steps in (3, 5):
    whole, checkpoint = fit(steps)
    resumed, _ = fit(steps, checkpoint)
    same = torch.equal(whole.layer.weight, resumed.layer.weight)
    first, right = resumed.seen[0], whole.seen[steps]
    print(
        f"after {steps} of 5 batches: epoch and batch {first[:2]} with rows {first[2]}; uninterrupted {right[:2]} with {right[2]}"
    )
    print(f"  weights at the end are the same: {same}; on_train_epoch_start in epochs {resumed.began}")
    assert first[:2] == right[:2] and len(resumed.seen) == len(whole.seen) - steps
    if steps == 3:
        assert first[2] == [0.0, 1.0, 2.0, 3.0] and right[2] == [12.0, 13.0, 14.0, 15.0] and not same
        assert resumed.began == [1]
    else:
        assert first[2] == right[2] and same and resumed.began == []
PYTHON
