from __future__ import annotations

from datetime import timedelta

import pytest
from tiny import Clock, Tiny, data

from raytrainer import Callback, ConfigurationError, ModelCheckpoint, Timer
from raytrainer.callbacks import timer
from raytrainer.driver.workers.group_supply import GroupSupply
from raytrainer.driver.workers.local_group import LocalGroup
from raytrainer.errors import WorkerLostError


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(100.0)
    monkeypatch.setattr(timer, "time", clock)
    return clock


class Ticking(Tiny):
    """Ten seconds a batch of training, one of evaluation."""

    def __init__(self, clock):
        super().__init__()
        self.__dict__["clock"] = clock

    def training_step(self, batch, batch_idx):
        self.clock.now += 10
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.now += 1

    test_step = validation_step


def test_measures_every_stage(clock, local_trainer):
    callback = Timer("00:00:10:00")
    assert callback.time_elapsed() == 0 and callback.time_remaining() == 600 and callback.start_time() is None
    trainer, module = local_trainer(max_epochs=2, callbacks=callback, num_sanity_val_steps=1), Ticking(clock)
    trainer.fit(module, data(), data(6))
    trainer.test(module, data(8), verbose=False)
    elapsed = {stage: callback.time_elapsed(stage) for stage in ("train", "sanity", "validate", "test", "predict")}
    assert elapsed == {"train": 206, "sanity": 1, "validate": 3, "test": 4, "predict": 0}
    assert (callback.start_time(), callback.end_time(), callback.time_remaining()) == (101, 307, 394)
    assert Timer().time_remaining() is None
    with pytest.raises(ConfigurationError, match="lunch"):
        callback.time_elapsed("lunch")


@pytest.mark.parametrize(
    "options,story", [({}, "3"), ({"interval": "epoch"}, "10 |"), ({"min_epochs": 2}, "10 | 10 |")]
)
def test_asks_to_stop(options, story, clock, local_trainer):
    module = Ticking(clock)
    interval = options.pop("interval", "step")
    callbacks = [Timer(timedelta(seconds=25), interval), EveryStep()]
    trainer = local_trainer(max_epochs=5, callbacks=callbacks, **{"min_epochs": 0, **options})
    trainer.fit(module, data())
    assert module.story.removesuffix(" |") == story.removesuffix(" |")


class EveryStep(Callback):
    every_n_train_steps = 1


def test_resumed_training_has_had_some_of_its_time(clock, tmp_path, local_trainer):
    saving = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=5)
    local_trainer(max_steps=5, callbacks=[Timer(), saving]).fit(Ticking(clock), data())
    callback, module = Timer({"seconds": 80}), Ticking(clock)
    trainer = local_trainer(max_epochs=9, min_epochs=0, callbacks=[callback, EveryStep()])
    trainer.fit(module, data(), ckpt_path=tmp_path / "x.ckpt")
    assert callback.time_elapsed() == 80 and module.events.count("t") == 3
    # nothing is left: the next one trains no batch
    callback, module = Timer({"seconds": 50}), Ticking(clock)
    local_trainer(max_epochs=9, min_epochs=0, callbacks=callback).fit(module, data(), ckpt_path=tmp_path / "x.ckpt")
    assert module.events.count("t") == 0
    # and a run from the beginning has all of it
    trainer.fit(Ticking(clock), data())
    assert trainer.global_step == 8


def test_goes_on_from_a_snapshot_when_a_worker_was_lost(clock):
    callback = Timer()
    callback.on_train_start(None, None)
    clock.now += 4
    state = callback.state_dict()
    clock.now += 3
    callback.load_state_dict(state)
    clock.now += 1
    assert callback.time_elapsed() == 5


class Dying(LocalGroup):
    """Workers as if of another process, which die of `LookupError`."""

    in_process = False

    def call(self, method, *args):
        try:
            return super().call(method, *args)
        except LookupError:
            raise WorkerLostError(0, "is lost") from None


class Mortal(Ticking):
    dies = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.events.count("t") in self.dies:
            raise LookupError
        return loss


def test_recovery_from_the_beginning_forgets_the_fit_before(clock, local_trainer, monkeypatch):
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Dying())
    callback, module = Timer({"seconds": 300}), Mortal(clock)
    trainer = local_trainer(max_steps=20, callbacks=callback, snapshot_every=None)
    trainer.fit(module, data())
    module.dies, module.events = (3,), []
    trainer.fit(module, data())
    assert len(trainer.recoveries) == 1 and trainer.global_step == 20
    assert callback.time_elapsed() == 200


@pytest.mark.parametrize("dies", [(2,), ()])
def test_a_run_that_was_resumed_and_failed_leaves_its_time_behind(dies, clock, tmp_path, local_trainer):
    saving = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=5)
    local_trainer(max_steps=5, callbacks=[Timer(), saving]).fit(Ticking(clock), data())
    callback, module = Timer(), Mortal(clock)
    module.dies = dies
    if not dies:
        module.on_train_start = lambda: 1 / 0  # before the driver's clock has started
    trainer = local_trainer(max_epochs=2, callbacks=callback)
    with pytest.raises((LookupError, ZeroDivisionError)):
        trainer.fit(module, data(), ckpt_path=tmp_path / "x.ckpt")
    clock.now += 1000
    assert callback.time_elapsed() == (70 if dies else 50)
    trainer.fit(Ticking(clock), data())
    assert callback.time_elapsed() == 200


@pytest.mark.parametrize("arguments", [{"duration": "1:2"}, {"duration": -1}, {"interval": "batch"}])
def test_bad_arguments(arguments):
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        Timer(**arguments)
