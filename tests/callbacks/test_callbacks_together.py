"""Callbacks of one class side by side, and what callbacks log."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny import Tiny, data, weights

from raytrainer import (
    Callback,
    ConfigurationError,
    EMAWeightAveraging,
    MetricError,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    WorkerCallback,
)


class Images(Callback):
    def __init__(self, stage):
        self.stage, self.calls = stage, 0

    def on_train_epoch_end(self, trainer, module):
        self.calls += 1


class WithState(Images):
    def state_dict(self):
        return {"calls": self.calls}


def test_two_without_a_state(local_trainer, tmp_path):
    pair = [Images("train"), Images("val")]
    trainer = local_trainer(max_epochs=1, callbacks=[*pair, ModelCheckpoint(tmp_path)])
    trainer.fit(Tiny(), data())
    assert [callback.calls for callback in pair] == [1, 1]


@pytest.mark.parametrize("pair", [[WithState("a"), WithState("b")], [ProgressBar(), ProgressBar()]])
def test_two_with_one_state_key(pair, local_trainer):
    with pytest.raises(ConfigurationError, match="share the state key"):
        local_trainer(callbacks=pair)


class Logging(WorkerCallback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.log("batch", float(batch_idx), on_step=True, on_epoch=True)

    def on_validation_epoch_end(self, trainer, module):
        self.log_dict({"a": 1.0, "b": 2.0})


def test_worker_callbacks_log(local_trainer):
    callback = Logging()
    trainer = local_trainer(max_epochs=1, callbacks=callback)
    trainer.fit(Tiny(), data(), data(4))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["batch_epoch"] == 4.5 and (found["a"], found["b"]) == (1.0, 2.0)
    assert vars(pickle.loads(pickle.dumps(callback))) == {}
    with pytest.raises(MetricError, match=r"Logging\.log\('x', \.\.\.\): this callback is in no run"):
        callback.log("x", 1.0)


@pytest.mark.parametrize("how", ["log", "log_dict", "module"])
def test_drivers_callbacks_say_where_to_log(how, local_trainer):
    class Wrong(Callback):
        def on_train_epoch_end(self, trainer, module):
            if how == "module":
                module.log("x", 1.0)
            else:
                getattr(self, how)("x" if how == "log" else {"x": 1.0}, *([1.0] if how == "log" else []))

    with pytest.raises(MetricError, match=r"x.*WorkerCallback"):
        local_trainer(max_epochs=1, callbacks=Wrong()).fit(Tiny(), data())


@pytest.mark.parametrize("averaging", [lambda: EMAWeightAveraging(0.5), lambda: StochasticWeightAveraging(0.1, 0)])
def test_a_finished_run_that_is_started_again_ends_with_the_averages(averaging, local_trainer, tmp_path):
    module, again = Tiny(), Tiny()
    local_trainer(max_epochs=2, callbacks=[averaging(), ModelCheckpoint(tmp_path, save_last=True)]).fit(module, data())
    trainer = local_trainer(max_epochs=2, callbacks=averaging())
    trainer.fit(again, data(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(weights(again), weights(module)) and again.events == []
    trainer.save_checkpoint(tmp_path / "over.ckpt")
    assert torch.equal(weights(Tiny.load_from_checkpoint(tmp_path / "over.ckpt")), weights(module))


@pytest.mark.parametrize("averaging", [lambda: EMAWeightAveraging(0.5), lambda: StochasticWeightAveraging(0.1, 0)])
def test_a_run_that_is_saved_after_its_end_goes_on_with_the_weights_that_were_trained(
    averaging, local_trainer, tmp_path
):
    straight = Tiny()
    first, second = copy.deepcopy(straight), copy.deepcopy(straight)
    local_trainer(max_epochs=4, callbacks=averaging()).fit(straight, data())
    trainer = local_trainer(max_epochs=3, callbacks=averaging())
    trainer.fit(first, data())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.equal(weights(Tiny.load_from_checkpoint(tmp_path / "end.ckpt")), weights(first))  # the averages
    local_trainer(max_epochs=4, callbacks=averaging()).fit(second, data(), ckpt_path=tmp_path / "end.ckpt")
    assert torch.equal(weights(second), weights(straight)) and not torch.equal(weights(first), weights(straight))
