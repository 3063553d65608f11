from __future__ import annotations

import pytest
from tiny import Tiny, data

from raytrainer import ConfigurationError, LambdaCallback, LambdaWorkerCallback, ModelCheckpoint
from raytrainer.checkpointing.checkpoint_format import read_checkpoint


def test_hooks_are_called_with_their_arguments(tmp_path, local_trainer):
    seen = []
    callbacks = [
        LambdaCallback(setup=lambda trainer, module, stage: seen.append(stage)),
        LambdaCallback(on_train_epoch_end=lambda trainer, module: seen.append(trainer.current_epoch)),
        LambdaCallback(on_save_checkpoint=lambda trainer, module, checkpoint: checkpoint.update(mine=3)),
        LambdaWorkerCallback(on_train_batch_start=lambda trainer, module, batch, batch_idx: seen.append(-batch_idx)),
        LambdaWorkerCallback(on_train_batch_end=lambda *arguments: seen.append(len(arguments))),
        ModelCheckpoint(tmp_path, filename="x"),
    ]
    local_trainer(max_epochs=2, callbacks=callbacks).fit(Tiny(), data(4))
    assert seen == ["fit", 0, 5, -1, 5, 0, 0, 5, -1, 5, 1]
    assert read_checkpoint(tmp_path / "x.ckpt")["mine"] == 3


def test_hooks_that_there_are_not():
    with pytest.raises(ConfigurationError, match="that is a hook of LambdaWorkerCallback"):
        LambdaCallback(on_train_batch_end=print)
    with pytest.raises(ConfigurationError, match="that is a hook of LambdaCallback"):
        LambdaWorkerCallback(on_train_chunk_end=print)
    with pytest.raises(ConfigurationError, match=r"on_lunch.*'on_fit_end'"):
        LambdaCallback(on_lunch=print)
    with pytest.raises(ConfigurationError, match="give a function"):
        LambdaCallback(on_fit_end=3)
