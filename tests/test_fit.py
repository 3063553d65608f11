"""Whole runs in process: what is trained, when validation runs, when a run ends, what it leaves behind."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import ClassVar

import numpy
import pytest
import torch
from tiny import Clock, Tiny, data, weights
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from raytrainer import Callback, ConfigurationError, DataError, EarlyStopping, WorkerCallback
from raytrainer.driver.loop import chunks

# ---------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("options", "story", "epoch", "step"),
    [
        ({"max_epochs": 2}, "10 v | 10 v |", 2, 20),
        ({"max_epochs": 2, "val_check_interval": 4}, "4 v 4 v 2 | 4 v 4 v 2 |", 2, 20),
        ({"max_epochs": 1, "val_check_interval": 0.3}, "3 v 3 v 3 v 1 |", 1, 10),
        ({"max_epochs": 1, "val_check_interval": 1, "limit_train_batches": 2}, "1 v 1 v |", 1, 2),
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, "10 | 10 v | 10 | 10 v |", 4, 40),
        (
            {"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 12},
            "10 | 2 v 8 | 4 v 6 |",
            3,
            30,
        ),
        ({"max_steps": 13}, "10 v | 3 |", 1, 13),
        ({"max_steps": 13, "max_epochs": 1}, "10 v | 3 |", 1, 13),
        ({"max_steps": 20}, "10 v | 10 v |", 2, 20),
        ({"max_steps": 4, "accumulate_grad_batches": 4}, "10 v | 4 |", 1, 4),
        ({"max_epochs": 1, "accumulate_grad_batches": 4, "val_check_interval": 3}, "3 v 3 v 3 v 1 |", 1, 3),
        ({"max_epochs": 1, "limit_train_batches": 0.29}, "2 v |", 1, 2),
        ({"max_epochs": 1, "limit_train_batches": 3.0}, "3 v |", 1, 3),
        ({"max_epochs": 1, "limit_val_batches": 0}, "10 |", 1, 10),
        ({"max_epochs": 0}, "", 0, 0),
        ({"max_steps": 0}, "", 0, 0),
        ({"max_epochs": 1, "limit_train_batches": 0}, "", 0, 0),
        ({"max_time": {"seconds": 0}}, "", 0, 0),
        ({"fast_dev_run": 3}, "3 v |", 1, 3),
        ({"fast_dev_run": True, "max_steps": 100}, "1 v |", 1, 1),
        ({"overfit_batches": 2, "max_epochs": 2}, "2 v | 2 v |", 2, 4),
    ],
)
def test_schedule(options, story, epoch, step, local_trainer):
    trainer = local_trainer(num_sanity_val_steps=0, **options)
    module = Tiny()
    trainer.fit(module, data(), data(6))
    assert module.story == story
    assert (trainer.current_epoch, trainer.global_step) == (epoch, step)
    assert trainer.state.finished and not trainer.interrupted


@pytest.mark.parametrize(
    ("options", "stop_at", "story"),
    [
        ({"max_epochs": 9, "min_epochs": 0}, 6, "6 v |"),
        ({"max_epochs": 9}, 6, "10 v |"),
        ({"max_epochs": 9, "min_epochs": 2}, 6, "10 v | 10 v |"),
        ({"max_epochs": 9, "min_steps": 14, "min_epochs": 1}, 2, "10 v | 4 v |"),
        ({"max_epochs": 9, "min_steps": 8, "min_epochs": 5}, 2, "8 v |"),
        ({"max_epochs": 1, "min_epochs": 3}, 6, "10 v |"),
        ({"max_epochs": 9, "min_epochs": 0, "limit_val_batches": 0}, 6, "6 |"),
    ],
)
@pytest.mark.parametrize("who", ["module", "worker callback", "driver callback"])
def test_stop_that_is_asked_for(options, stop_at, story, who, local_trainer):
    class Stopping(Tiny):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.should_stop |= who == "module" and self.events.count("t") == stop_at

    class Beside(WorkerCallback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop |= module.events.count("t") == stop_at

    class Driver(Callback):
        every_n_train_steps = 2  # so that it is called at exactly that step

        def on_train_chunk_end(self, trainer, module, report):
            if trainer.global_step >= stop_at:
                trainer.should_stop = True

    callbacks = {"module": None, "worker callback": Beside(), "driver callback": Driver()}[who]
    module = Stopping()
    trainer = local_trainer(num_sanity_val_steps=0, callbacks=callbacks, **options)
    trainer.fit(module, data(), data(6))
    assert module.story == story
    assert trainer.should_stop


@pytest.fixture(autouse=True)
def chunks_of_one(monkeypatch, request):
    """Stops asked for inside a chunk act at its end; with chunks of one batch the tables are exact."""
    if "stop_at" in request.fixturenames:
        monkeypatch.setattr("raytrainer.plan.steps_and_epochs.chunk_batches", lambda *args, **kwargs: 1)


def test_early_stopping_after_validation(local_trainer):
    class Flat(Tiny):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

    stopping = EarlyStopping("val_loss", patience=2)
    for minimum, story in (
        ({}, "10 v | 10 v | 10 v |"),
        ({"min_epochs": 5}, "10 v | " * 4 + "10 v |"),
        ({"min_steps": 45}, "10 v | " * 4 + "5 v |"),
    ):
        module = Flat()
        stopping = EarlyStopping("val_loss", patience=2)
        local_trainer(max_epochs=9, callbacks=stopping, num_sanity_val_steps=0, **minimum).fit(module, data(), data(4))
        assert module.story == story
        assert stopping.stopped_epoch >= 2


def test_max_time_ends_a_run(local_trainer, monkeypatch):
    monkeypatch.setattr(chunks, "time", clock := Clock(100.0))

    class Slow(Tiny):
        def training_step(self, batch, batch_idx):
            clock.now += 10
            return super().training_step(batch, batch_idx)

    trainer, module = local_trainer(max_time={"seconds": 150}, max_epochs=-1), Slow()
    trainer.fit(module, data())
    assert 15 <= trainer.global_step <= 20, "at the end of a chunk, which an epoch's end is"
    assert trainer.state.finished


def test_validation_interval_longer_than_an_epoch(local_trainer):
    with pytest.raises(ConfigurationError, match=r"val_check_interval=11 .*10 training batches"):
        local_trainer(val_check_interval=11).fit(Tiny(), data(), data(4))


def test_limit_that_leaves_nothing(local_trainer):
    with pytest.raises(ConfigurationError, match=r"limit_val_batches=0\.1 of a loader with 3 batches"):
        local_trainer(limit_val_batches=0.1, max_epochs=1).fit(Tiny(), data(), data(6))


# ---------------------------------------------------------------- loaders


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter([(torch.ones(4), torch.ones(2))] * self.samples)


@pytest.mark.parametrize(
    ("options", "story", "step"),
    [
        ({}, "4 v | 4 v |", 8),
        ({"val_check_interval": 3}, "3 v 1 | 3 v 1 |", 8),
        ({"limit_train_batches": 2}, "2 v | 2 v |", 4),
        ({"limit_train_batches": 50}, "4 v | 4 v |", 8),
        ({"accumulate_grad_batches": 3}, "4 v | 4 v |", 4),
    ],
)
def test_loader_without_length(options, story, step, local_trainer):
    module = Tiny()
    trainer = local_trainer(max_epochs=2, num_sanity_val_steps=0, **options)
    trainer.fit(module, DataLoader(Stream(7), batch_size=2), data(4))
    assert (module.story, trainer.global_step) == (story, step)


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_steps": 2}])
def test_stream_that_yields_nothing(limits, local_trainer):
    with pytest.raises(DataError, match=r"train.*no batch.*rank 0"):
        local_trainer(**limits).fit(Tiny(), DataLoader(Stream(0)))


def test_generator_that_is_used_up(local_trainer):
    once = (batch for batch in data())
    module = Tiny()
    with pytest.raises(DataError, match="train"):
        local_trainer(max_epochs=2).fit(module, once)
    assert module.story == "10 |"


def test_loaders_are_reloaded_every_n_epochs(local_trainer):
    class Own(Tiny):
        def __init__(self):
            super().__init__()
            self.loaded = []

        def train_dataloader(self):
            self.loaded.append(("train", self.current_epoch))
            return data(4 + 2 * self.current_epoch)

        def val_dataloader(self):
            self.loaded.append(("val", self.current_epoch))
            return data(4)

    for every, epochs in ((0, [0]), (1, [0, 1, 2, 3]), (2, [0, 2])):
        module = Own()
        local_trainer(max_epochs=4, reload_dataloaders_every_n_epochs=every).fit(module)
        assert [epoch for kind, epoch in module.loaded if kind == "train"] == epochs
        assert len([epoch for kind, epoch in module.loaded if kind == "val"]) == len(epochs)
    assert module.story == "s 2 v | 2 v | 4 v | 4 v |"


def test_validation_loaders_are_made_anew_for_validations_only(local_trainer):
    class Loaders(Tiny):
        made: ClassVar[list] = []

        def train_dataloader(self):
            self.made.append(f"t{self.current_epoch}")
            return data(4)

        def val_dataloader(self):
            self.made.append(f"v{self.current_epoch}")
            return data(4)

    options = {"reload_dataloaders_every_n_epochs": 1, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}
    local_trainer(max_epochs=4, **options).fit(Loaders())
    assert Loaders.made == ["t0", "v0", "t1", "v1", "t2", "t3", "v3"]


def test_overfitting_trains_on_the_same_batches_in_order(local_trainer):
    class Seeing(Tiny):
        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), batch[0]]
            return super().training_step(batch, batch_idx)

    module = Seeing()
    local_trainer(max_epochs=3, overfit_batches=2).fit(module, data(shuffle=True), data(8))
    first = [batch[0] for batch in data()][:2]
    assert len(module.seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(module.seen, first * 3, strict=True))


def test_start_of_an_epoch_can_be_the_end(local_trainer):
    class Skipping(Tiny):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

    module = Skipping()
    trainer = local_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, data(), data(4))
    assert (module.story, trainer.global_step, trainer.current_epoch) == ("3 v | 3 v |", 6, 2)


# ---------------------------------------------------------------- nothing to see here


def test_sanity_check_leaves_no_trace(local_trainer):
    class Drawing(Tiny):
        def validation_step(self, batch, batch_idx):
            torch.rand(3)
            random.random()
            self.log("val_loss", self.loss(batch))
            self.log("val_step", 1.0, on_step=True)

        def on_train_start(self):
            self.states = torch.get_rng_state(), random.getstate()
            self.metrics = dict(self.trainer.callback_metrics)

    class Watching(Callback):
        seen: list = []  # noqa: RUF012

        def on_train_start(self, trainer, module):
            self.seen.append(
                (dict(trainer.callback_metrics), dict(trainer.logged_metrics), trainer.progress_bar_metrics)
            )

    runs = []
    for steps in (0, 2, -1):
        torch.manual_seed(5)
        random.seed(5)
        module = Drawing()
        trainer = local_trainer(max_epochs=1, num_sanity_val_steps=steps, callbacks=Watching(), log_every_n_steps=1)
        trainer.fit(module, data(shuffle=True), data(8))
        assert module.metrics == {}
        assert module.story.count("s") == (steps != 0)
        runs.append((module, weights(module)))
    for module, trained in runs[1:]:
        assert torch.equal(trained, runs[0][1])
        assert torch.equal(module.states[0], runs[0][0].states[0]) and module.states[1] == runs[0][0].states[1]
    assert Watching.seen == [({}, {}, {})] * 3


def test_the_sanity_check_leaves_no_trace_of_hooks_that_draw(local_trainer):
    """Random data of loaders, and the generators that training finds, are the same without it."""

    class Random(Tiny):
        def __init__(self):
            super().__init__()
            self.batches = []

        def train_dataloader(self):
            random.random()
            return DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 2)), 2)

        def val_dataloader(self):
            numpy.random.rand()
            return self.train_dataloader()

        def training_step(self, batch, batch_idx):
            self.batches += [*batch, torch.rand(1), torch.tensor([random.random(), numpy.random.rand()])]
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                self.batches += batch

    class Drawing(Callback):
        def on_sanity_check_start(self, trainer, module):
            torch.rand(1)

        def on_sanity_check_end(self, trainer, module):
            numpy.random.rand()

    runs = []
    for steps in (0, 1, 2, -1):
        torch.manual_seed(5)
        random.seed(5)
        numpy.random.seed(5)
        module = Random()
        local_trainer(max_epochs=2, num_sanity_val_steps=steps, callbacks=Drawing()).fit(module)
        runs.append(torch.cat([tensor.flatten() for tensor in module.batches]))
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize(
    ("steps", "limit", "batches"), [(2, 1.0, [2, 2]), (-1, 1.0, [4, 3]), (5, 1.0, [4, 3]), (5, 1, [1, 1])]
)
def test_sanity_check_batches_per_loader(steps, limit, batches, local_trainer):
    class Counting(Tiny):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            if self.trainer.sanity_checking:
                self.events.append(str(dataloader_idx))

    module = Counting()
    trainer = local_trainer(max_epochs=1, num_sanity_val_steps=steps, limit_val_batches=limit)
    trainer.fit(module, data(), [data(8), data(6)])
    assert [module.events.count("0"), module.events.count("1")] == batches
    assert trainer.num_sanity_val_batches == batches


def test_fast_dev_run_writes_nothing(local_trainer, tmp_path):
    trainer = local_trainer(fast_dev_run=True, logger=True, enable_checkpointing=True, enable_progress_bar=True)
    trainer.fit(Tiny(), data(), data(4))
    assert list(tmp_path.iterdir()) == [] and trainer.loggers == []


def test_flags_are_put_back(local_trainer):
    class Looking(Tiny):
        def on_train_start(self):
            self.flags = (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_anomaly_enabled(),
                torch.backends.cudnn.benchmark,
            )

    module = Looking()
    local_trainer(max_steps=1, deterministic=True, detect_anomaly=True).fit(module, data())
    assert module.flags == (True, True, False)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.is_anomaly_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    module = Looking()
    local_trainer(max_steps=1, benchmark=True).fit(module, data())
    assert module.flags == (False, False, True) and not torch.backends.cudnn.benchmark


def test_flags_are_put_back_after_an_error(local_trainer):
    class Failing(Tiny):
        def training_step(self, batch, batch_idx):
            raise LookupError("a user's error")

    module = Failing()
    trainer = local_trainer(max_steps=1, deterministic=True)
    with pytest.raises(LookupError, match="a user's error"):
        trainer.fit(module, data())
    assert not torch.are_deterministic_algorithms_enabled()
    assert trainer.state.status == "failed"
    assert module.trainer is trainer
    trainer.fit(Tiny(), data())  # the trainer can be used again
    assert trainer.state.finished


def test_modes_are_preserved(local_trainer):
    class Frozen(Tiny):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(4)).eval()

        def validation_step(self, batch, batch_idx):
            assert not any(m.training for m in self.modules())

        test_step = validation_step

        def training_step(self, batch, batch_idx):
            assert self.training and self.layer.training and not any(m.training for m in self.backbone.modules())
            return self.loss(batch)

    module = Frozen()
    before = {name: m.training for name, m in module.named_modules()}
    trainer = local_trainer(max_epochs=2, val_check_interval=3)
    trainer.fit(module, data(), data(4))
    assert {name: m.training for name, m in module.named_modules()} == before
    trainer.validate(module, data(4), verbose=False)
    trainer.test(module, data(4), verbose=False)
    assert {name: m.training for name, m in module.named_modules()} == before


@pytest.mark.parametrize("inference", [True, False])
def test_gradients_during_evaluation(inference, local_trainer):
    class Looking(Tiny):
        def validation_step(self, batch, batch_idx):
            self.events.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

        def training_step(self, batch, batch_idx):
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            return self.loss(batch)

    module = Looking()
    local_trainer(max_epochs=1, inference_mode=inference).fit(module, data(4), data(2))
    assert set(module.events) - {"s", "v", "|"} == {(False, inference)}


# ---------------------------------------------------------------- again, and what a run is given


def test_seed_makes_runs_repeatable(local_trainer):
    class Noisy(Tiny):
        def forward(self, x):
            return self.layer(torch.nn.functional.dropout(x))

    def run(seed, scramble=0):
        torch.manual_seed(0)
        module = Noisy()
        torch.manual_seed(scramble)
        local_trainer(max_epochs=2, seed=seed).fit(module, data(shuffle=True), data(4))
        return weights(module)

    assert torch.equal(run(7), run(7, scramble=3))
    assert not torch.equal(run(7), run(8))
    # without one, torch's own generator makes it repeatable
    assert torch.equal(run(None, scramble=1), run(None, scramble=1))
    assert not torch.equal(run(None, scramble=1), run(None, scramble=2))


def test_seed_everything_is_taken_up(local_trainer):
    import raytrainer

    assert raytrainer.seed_everything(5) == 5
    assert local_trainer().settings.seed == 5
    assert local_trainer(seed=6).settings.seed == 6


def test_fit_twice_begins_anew(local_trainer):
    trainer, module = local_trainer(max_epochs=1), Tiny()
    trainer.fit(module, data())
    first = weights(module)
    trainer.fit(module, data())
    assert (trainer.global_step, trainer.current_epoch) == (10, 1)
    assert not torch.equal(weights(module), first)


def test_counters_survive_evaluation(local_trainer):
    trainer, module = local_trainer(max_epochs=1), Tiny()
    trainer.fit(module, data())
    trainer.validate(module, data(4), verbose=False)
    assert (trainer.global_step, trainer.current_epoch, trainer.state.fn) == (10, 1, "validate")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training_step": None}, r"Tiny has no training_step\(\); fit needs one"),
        ({"configure_optimizers": None}, r"Tiny has no configure_optimizers\(\); fit needs one"),
    ],
)
def test_what_fit_needs_of_a_module(change, message, local_trainer):
    module = Tiny()
    for name, value in change.items():
        setattr(module, name, value)
    with pytest.raises(ConfigurationError, match=message):
        local_trainer().fit(module, data())


def test_what_fit_needs_else(local_trainer):
    with pytest.raises(ConfigurationError, match="fit needs training data"):
        local_trainer().fit(Tiny())
    with pytest.raises(ConfigurationError, match=r"model=Linear, .*give a raytrainer\.Module"):
        local_trainer().fit(torch.nn.Linear(1, 1), data())


# ---------------------------------------------------------------- Ctrl-C


class Interrupting(Tiny):
    def __init__(self, times):
        super().__init__()
        self.times = times

    def training_step(self, batch, batch_idx):
        if len(self.events) == 3:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
        return super().training_step(batch, batch_idx)


def test_ctrl_c_once_stops_and_keeps_the_weights(local_trainer):
    ended = []

    class Ending(Callback):
        def on_train_end(self, trainer, module):
            ended.append("train")

        def on_fit_end(self, trainer, module):
            ended.append("fit")

        def on_exception(self, trainer, module, exception):
            ended.append("exception")

    before = signal.getsignal(signal.SIGINT)
    module, trainer = Interrupting(1), local_trainer(max_epochs=10_000, callbacks=Ending())
    start = weights(module)
    trainer.fit(module, data(), data(4))
    assert trainer.interrupted and trainer.state.status == "interrupted"
    assert 4 <= trainer.global_step < 50_000 and trainer.global_step == module.events.count("t")
    assert not torch.equal(weights(module), start)
    assert ended == ["train", "fit"]
    assert signal.getsignal(signal.SIGINT) is before
    trainer.validate(module, data(4), verbose=False)
    assert not trainer.interrupted and trainer.state.finished


def test_ctrl_c_twice_aborts_at_once(local_trainer):
    seen = []

    class Watching(Callback):
        def on_exception(self, trainer, module, exception):
            seen.append(type(exception))

        def teardown(self, trainer, module, stage):
            seen.append("teardown")

    before = signal.getsignal(signal.SIGINT)
    module, trainer = Interrupting(2), local_trainer(max_epochs=10_000, callbacks=Watching())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(module, data())
    assert module.events == ["t"] * 3
    assert trainer.interrupted and trainer.state.status == "interrupted"
    assert seen == [KeyboardInterrupt, "teardown"]
    assert signal.getsignal(signal.SIGINT) is before


def test_own_signal_handler_is_respected(local_trainer):
    caught = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append(1))
    try:
        trainer = local_trainer(max_epochs=1)
        trainer.fit(Interrupting(1), data())
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [1] and not trainer.interrupted and trainer.global_step == 10
