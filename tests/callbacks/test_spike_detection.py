"""SpikeDetection: which losses end a run, what is written then, and how it goes on."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from tiny import Tiny, data

from raytrainer import ConfigurationError, ModelCheckpoint, SpikeDetection, TrainingSpikeError


class Given(Tiny):
    """Its losses are what it is made with, over and over."""

    def __init__(self, losses, manual=False):
        super().__init__()
        self.losses, self.automatic_optimization = losses, not manual

    def training_step(self, batch, batch_idx):
        value = self.losses[batch_idx]
        return None if value is None else super().training_step(batch, batch_idx) * 0 + value


@pytest.mark.parametrize(
    ("losses", "options", "spike"),
    [
        ([1.0, 1.0, 3.1], {}, 2),  # away from the mean by twice the mean
        ([1.0, 1.0, 2.9], {}, None),
        ([9.0, 1.0, 1.0], {}, None),  # better is no spike
        ([1.0, 1.0, 2.9], {"rtol": 1.0}, 2),
        ([1.0, 1.0, 3.1], {"atol": 2.2}, None),
        ([1.0, 1.0, 1.5], {"atol": 0.4, "rtol": None}, 2),
        ([1.0, 1.0, -2.0], {"mode": "max"}, 2),
        ([1.0, 1.0, 9.0], {"mode": "max"}, None),
        ([100.0, 1.0, 1.0, 3.1], {"window": 2}, 3),
        ([100.0, 1.0, 1.0, 3.1], {"window": 3}, None),
        ([1.0, 9.0, 9.0], {"warmup": 2}, None),
        ([1.0, 9.0, 9.0], {"warmup": 1}, 1),
        ([1.0, math.nan, 1.0], {}, 1),
        ([1.0, -math.inf, 1.0], {}, 1),
        ([1.0, math.nan, 1.0, 3.1], {"finite_only": False}, 3),
        ([1.0, math.inf], {"finite_only": False}, 1),
        ([1.0, -math.inf, 1.0], {"finite_only": False}, None),
        ([math.nan, 1.0, 1.0], {}, None),  # in the warm-up
        ([1.0, None, 3.1], {}, 2),
    ],
)
def test_which_losses_are_spikes(losses, options, spike, local_trainer, tmp_path):
    watching = SpikeDetection(**options)
    trainer = local_trainer(max_epochs=1, callbacks=watching)
    path = tmp_path / "skip_batches.json"
    if spike is None:
        trainer.fit(Given(losses), data(2 * len(losses)))
        assert not path.exists()
        return
    with pytest.raises(TrainingSpikeError, match=f"spike in batch {spike} of epoch 0") as raised:
        trainer.fit(Given(losses), data(2 * len(losses)))
    assert raised.value.batch_idx == spike
    assert json.loads(path.read_text()) == [spike - 1, spike]


def test_a_run_goes_on_with_what_it_has_seen(local_trainer, tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="{step}", save_top_k=-1)
    with pytest.raises(TrainingSpikeError):
        local_trainer(max_epochs=1, callbacks=[saving, SpikeDetection()]).fit(Given([1.0, 1.0, 9.0]), data(6))
    path = tmp_path / "own" / "file.json"
    watching = SpikeDetection(warmup=0, exclude_batches_path=path)
    with pytest.raises(TrainingSpikeError, match="mean of the last 2 was 1"):
        local_trainer(max_epochs=1, callbacks=watching).fit(
            Given([1.0, 1.0, 9.0]), data(6), ckpt_path=tmp_path / "step=2.ckpt"
        )
    assert json.loads(path.read_text()) == watching.bad_batches == [1, 2]


def test_manual_optimization(local_trainer):
    trainer = local_trainer(max_epochs=1, callbacks=SpikeDetection())
    with pytest.raises(TrainingSpikeError):
        trainer.fit(Given([torch.tensor(1.0), torch.tensor(5.0)], manual=True), data(4))
    with pytest.raises(ConfigurationError, match="return it from training_step"):
        trainer.fit(Given([None, None], manual=True), data(4))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "less"}, "mode"),
        ({"window": 0}, "window"),
        ({"warmup": -1}, "warmup"),
        ({"atol": -1.0}, "atol"),
        ({"rtol": math.nan}, "rtol"),
        ({"finite_only": "no"}, "finite_only"),
    ],
)
def test_arguments(options, told):
    with pytest.raises(ConfigurationError, match=rf"SpikeDetection\({told}\)"):
        SpikeDetection(**options)


def test_the_error_can_be_sent():
    error = pickle.loads(pickle.dumps(TrainingSpikeError("It has jumped.", 3)))
    assert (str(error), error.batch_idx) == ("It has jumped.", 3)


def test_the_spike_is_told_where_the_disk_is_full(local_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    watching = SpikeDetection(exclude_batches_path=tmp_path / "file" / "skip.json")
    with pytest.raises(TrainingSpikeError, match=r"leave out are \[1, 2\], which could not be written to .*skip\.json"):
        local_trainer(max_epochs=1, callbacks=watching).fit(Given([1.0, 1.0, 3.1]), data(6))
