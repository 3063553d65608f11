"""What there is after `fit`: its whole state for a checkpoint, its best checkpoint, the Trainer; and copies of it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tiny import Tiny, data

import raytrainer
from raytrainer import (
    Callback,
    CheckpointError,
    DataModule,
    EMAWeightAveraging,
    ModelCheckpoint,
    Trainer,
    WorkerCallback,
)
from raytrainer.checkpointing.checkpoint_format import read_checkpoint


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


class Momentum(Tiny):
    """Its optimizer and scheduler have a state; `rates` are the learning rates of its steps."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Counting(Callback):
    def __init__(self):
        self.epochs = 0

    def on_train_epoch_end(self, trainer, module):
        self.epochs += 1

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict):
        self.epochs = state_dict["epochs"]


# ---------------------------------------------------------------- save_checkpoint


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_steps": 13}])
def test_a_run_goes_on_from_what_is_saved_after_it(limits, local_trainer, tmp_path):
    torch.manual_seed(0)
    whole, half = Momentum(), Momentum()
    half.load_state_dict(whole.state_dict())
    local_trainer(max_epochs=4, seed=3).fit(whole, data(shuffle=True))
    first = local_trainer(**limits, seed=3, callbacks=Counting())
    first.fit(half, data(shuffle=True))
    first.save_checkpoint(tmp_path / "end.ckpt")
    second, counting = Momentum(), Counting()
    trainer = local_trainer(max_epochs=4, seed=3, callbacks=counting)
    trainer.fit(second, data(shuffle=True), ckpt_path=tmp_path / "end.ckpt")
    assert same(second.state_dict(), whole.state_dict()) and half.rates + second.rates == whole.rates
    assert (trainer.global_step, trainer.current_epoch) == (40, 4)
    assert counting.epochs == 4 + ("max_steps" in limits)  # an epoch that is cut ends there, too


def test_hooks_have_their_part_of_it(local_trainer, tmp_path):
    class Saving(Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            checkpoint["callback"] = sorted(checkpoint)

    class Own(Tiny):
        saves = 0

        def on_save_checkpoint(self, checkpoint):
            self.saves += 1
            checkpoint["module"] = "optimizer_states" in checkpoint

    module, trainer = Own(), local_trainer(max_epochs=1, callbacks=Saving())
    trainer.fit(module, data())
    assert module.saves == 0
    with torch.no_grad():
        module.layer.weight.fill_(3.0)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    found = read_checkpoint(tmp_path / "x.ckpt")
    assert module.saves == 1 and found["module"] is True and "progress" in found["callback"]
    assert (found["state_dict"]["layer.weight"] == 3).all()
    trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    assert "optimizer_states" not in read_checkpoint(tmp_path / "w.ckpt")


def test_there_must_have_been_a_fit_of_that_module(local_trainer, tmp_path):
    trainer = local_trainer(max_epochs=1)
    with pytest.raises(CheckpointError, match="no module yet"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    trainer.validate(Tiny(), data(4), verbose=False)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"has not fitted this module to an end\..*weights_only=True"):
            trainer.save_checkpoint(tmp_path / "x.ckpt")
        trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
        trainer.fit(fitted := Tiny(), data())
        trainer.save_checkpoint(tmp_path / "y.ckpt")
        trainer.test(fitted, data(4), verbose=False)
        trainer.save_checkpoint(tmp_path / "y.ckpt")
        trainer.test(Tiny(), data(4), verbose=False)

    class Failing(Tiny):
        def training_step(self, batch, batch_idx):
            raise LookupError

    with pytest.raises(LookupError):
        trainer.fit(Failing(), data())
    with pytest.raises(CheckpointError, match="has not fitted this module"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")


def test_averages_at_the_end_are_what_goes_on(local_trainer, tmp_path):
    module, trainer = Tiny(), local_trainer(max_epochs=1, callbacks=EMAWeightAveraging(0.5))
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    local_trainer(max_epochs=2, callbacks=EMAWeightAveraging(0.5)).fit(Tiny(), data(), ckpt_path=tmp_path / "x.ckpt")
    assert same(read_checkpoint(tmp_path / "x.ckpt")["state_dict"], module.state_dict())


# ---------------------------------------------------------------- evaluation without a model


class Growing(Tiny):
    """Its weight is 1 in the first epoch, 5 in the second, as `size` says, of which the smallest is best."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.layer.weight.fill_(1.0 + 4 * self.current_epoch)
        return None

    def size(self, name):
        self.log(name, self.layer.weight.mean())

    def validation_step(self, batch, batch_idx):
        self.size("size")

    def test_step(self, batch, batch_idx):
        self.size("tested")

    def predict_step(self, batch, batch_idx):
        return self.layer.weight.mean().item()


def evaluated(trainer, verb, *args, **kwargs):
    if verb == "predict":
        return trainer.predict(*args, data(4), **kwargs)[0]
    return next(iter(getattr(trainer, verb)(*args, data(4), verbose=False, **kwargs)[0].values()))


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_without_a_model_the_best_checkpoint_is_taken(verb, local_trainer, tmp_path, caplog):
    saver = ModelCheckpoint(tmp_path / "best", monitor="size")
    trainer = local_trainer(max_epochs=2, callbacks=saver)
    module = Growing()
    trainer.fit(module, data(), data(4))
    assert trainer.ckpt_path is None and evaluated(trainer, verb, module) == 5 and trainer.ckpt_path is None
    assert evaluated(trainer, verb, None) == 1 and trainer.ckpt_path == saver.best_model_path
    assert f"{verb}() without a model takes the best checkpoint of the fit, {saver.best_model_path}" in caplog.text
    assert evaluated(trainer, verb, Growing(), ckpt_path=saver.best_model_path) == 1
    assert trainer.ckpt_path == saver.best_model_path


def test_without_a_best_checkpoint_it_is_the_end(local_trainer, caplog):
    trainer = local_trainer(max_epochs=2)
    trainer.fit(Growing(), data(), data(4))
    assert evaluated(trainer, "test", None) == 5 and trainer.ckpt_path is None
    assert "test() without a model: this fit has no best checkpoint" in caplog.text


# ---------------------------------------------------------------- the Trainer


def test_module_and_datamodule_know_their_trainer(local_trainer):
    class D(DataModule):
        def train_dataloader(self):
            return data()

    module, datamodule, trainer = Tiny(), D(), local_trainer(max_epochs=2)
    assert datamodule.trainer is None
    with pytest.raises(RuntimeError, match="not attached to a Trainer"):
        _ = module.trainer
    trainer.fit(module, datamodule=datamodule)
    assert module.trainer is trainer and datamodule.trainer is trainer
    assert (module.current_epoch, module.global_step) == (2, 20)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.current_epoch == 0
    assert pickle.loads(pickle.dumps(data_copy := Tiny())).layer.weight.shape == data_copy.layer.weight.shape
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None and datamodule.trainer is None and module.global_step == 0


def test_a_module_may_be_given_one(local_trainer):
    module, trainer = Tiny(), local_trainer(max_epochs=1)
    module.inner = Tiny()
    module.trainer = trainer
    assert module.trainer is module.inner.trainer is trainer and module.current_epoch == 0
    assert copy.deepcopy(module).__dict__["_trainer"] is None
    module.trainer = None
    with pytest.raises(RuntimeError, match="not attached to a Trainer"):
        _ = module.trainer


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("how", COPIES)
def test_trainers_can_be_copied(how, tmp_path):
    saver = ModelCheckpoint(tmp_path / "best", monitor="size")
    trainer = Trainer(max_epochs=2, callbacks=[saver, Counting()], default_root_dir=tmp_path, profiler="simple")
    fresh = COPIES[how](trainer)
    fresh.fit(Growing(), data(), data(4))
    assert fresh.global_step == 20 and trainer.global_step == 0
    trainer.fit(Growing(), data(), data(4))
    used = COPIES[how](trainer)
    assert used.callback_metrics == trainer.callback_metrics and used.max_epochs == 2
    assert evaluated(used, "test", None) == 1  # its own best
    used.fit(used.model, data(), data(4))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    if how != "copy":
        with pytest.raises(CheckpointError, match="has not fitted"):
            COPIES[how](trainer).save_checkpoint(tmp_path / "y.ckpt")


def callbacks():
    made = []
    for name in raytrainer.__all__:
        kind = getattr(raytrainer, name)
        if isinstance(kind, type) and issubclass(kind, (Callback, WorkerCallback)):
            made.append(kind)
    return made


ARGUMENTS = {
    "EarlyStopping": {"monitor": "size"}, "StochasticWeightAveraging": {"swa_lrs": 0.1},
    "GradientAccumulationScheduler": {"scheduling": {1: 2}}, "TuneReportCallback": {},
    "OnExceptionCheckpoint": {"dirpath": "x"}, "PredictionWriter": {"path": "x"},
    "WeightAveraging": {"avg_fn": torch.lerp},
}  # fmt: skip


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", callbacks(), ids=lambda kind: kind.__name__)
def test_callbacks_can_be_copied(kind, how):
    made = kind(**ARGUMENTS.get(kind.__name__, {}))
    again = COPIES[how](made)
    assert type(again) is kind and again.state_key == made.state_key and vars(again).keys() == vars(made).keys()


# ---------------------------------------------------------------- what a checkpoint has, and this trainer lacks


class CountingBeside(WorkerCallback):
    """As `Counting`, beside the module."""

    def state_dict(self):
        return {"seen": 1}


class Stateless(Callback):
    pass


@pytest.mark.parametrize("kind", [Counting, CountingBeside, Stateless])
def test_states_that_nobody_takes_up_are_told(kind, local_trainer, tmp_path, caplog):
    saving = ModelCheckpoint(tmp_path, save_last=True)
    local_trainer(max_epochs=1, callbacks=[saving, kind()]).fit(Tiny(), data())
    for callbacks in ([saving, kind()], [saving]):
        local_trainer(max_epochs=2, callbacks=callbacks).fit(Tiny(), data(), ckpt_path=tmp_path / "last.ckpt")
    told = [r.getMessage() for r in caplog.records if "callbacks that this Trainer does not have" in r.getMessage()]
    assert len(told) == (kind is not Stateless)
    assert all(f": {kind.__name__}. It is left out" in message for message in told)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_without_any_checkpoint_the_last_one_is_warned_of(verb, local_trainer, caplog):
    trainer = local_trainer(max_epochs=1)
    evaluated(trainer, verb, Growing(), ckpt_path="last")
    told = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.getMessage().partition(";")[0] for record in told] == ['ckpt_path="last": there is no checkpoint']
    assert trainer.ckpt_path is None
