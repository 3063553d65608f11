"""When metrics get their values, when an epoch ends, and when requests act: all in process."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import ClassVar

import pytest
import torch
from tiny import Clock, Tiny, data

from raytrainer import (
    Callback,
    EarlyStopping,
    LambdaCallback,
    LambdaWorkerCallback,
    ModelCheckpoint,
    WorkerCallback,
)
from raytrainer.callbacks.model_checkpoint import ModelCheckpoint as Saver
from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.driver.loop import chunks


class Logging(Tiny):
    """Two epochs of two batches, with values that tell where they come from."""

    def __init__(self):
        super().__init__()
        self.seen, self.validations = {}, 0

    def look(self, hook):
        view = self.trainer
        shown = view.callback_metrics, view.logged_metrics, view.progress_bar_metrics
        self.seen[hook, self.current_epoch] = [{name: float(v) for name, v in metrics.items()} for metrics in shown]

    def on_train_epoch_start(self):
        self.look("epoch start")

    def training_step(self, batch, batch_idx):
        value = 100.0 * self.current_epoch + batch_idx
        self.look(f"batch {batch_idx}")
        self.log("now", value)
        self.log("both", value, on_step=True, on_epoch=True, prog_bar=True)
        self.log("mean", value, on_step=False, on_epoch=True)
        self.log("hidden", value, logger=False)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.look(f"batch {batch_idx} end")

    def validation_step(self, batch, batch_idx):
        self.log("val", 10.0 * (self.current_epoch + 1))
        self.log("val_step", 1.0, on_step=True, on_epoch=False)
        self.look("validation step")

    def on_validation_epoch_end(self):
        self.log("end", 5.0)
        self.look("validation end")

    def on_train_epoch_end(self):
        self.look("epoch end")

    def on_train_end(self):
        self.look("train end")


def test_modules_see_what_lightning_shows(local_trainer):
    """As recorded with Lightning 2.6.6."""
    module = Logging()
    local_trainer(max_epochs=2, limit_train_batches=2, num_sanity_val_steps=2).fit(module, data(), data(2))
    seen = module.seen
    assert seen["epoch start", 0] == seen["batch 0", 0] == [{}, {}, {}]
    first = {"now": 0.0, "both": 0.0, "both_step": 0.0, "hidden": 0.0}
    assert seen["batch 0 end", 0] == [first, {"now": 0.0, "both_step": 0.0}, {"both_step": 0.0}]
    second = {name: 1.0 for name in first}
    stepped = {"now": 1.0, "both_step": 1.0}
    assert seen["batch 1 end", 0] == [second, stepped, {"both_step": 1.0}]
    # of evaluations, step values are for the loggers alone
    assert seen["validation step", 0] == [second, {**stepped, "val_step": 1.0}, {"both_step": 1.0}]
    validated = {"val": 10.0, "end": 5.0}
    assert seen["validation end", 0][0] == {**second, **validated}
    reduced = {"both": 0.5, "both_epoch": 0.5, "mean": 0.5}
    assert seen["epoch end", 0][0] == {**second, **validated, **reduced}
    assert seen["epoch end", 0][2] == {"both_step": 1.0, "both_epoch": 0.5}
    assert seen["epoch start", 1] == seen["epoch end", 0]
    later = {"now": 100.0, "both": 100.0, "both_step": 100.0, "hidden": 100.0}
    assert seen["batch 0 end", 1][0] == {**seen["epoch end", 0][0], **later}
    assert seen["train end", 2][0] == seen["epoch end", 1][0]
    assert seen["train end", 2][0]["mean"] == 100.5 and seen["train end", 2][0]["val"] == 20.0


# ---------------------------------------------------------------- acting on metrics


class Plateau(Tiny):
    """Logs `values` in turn, and notes the learning rate of each epoch (or step)."""

    def __init__(self, values, interval="epoch", where="validation", **options):
        super().__init__()
        self.values, self.interval, self.where, self.options = list(values), interval, where, options
        self.rates = []

    def on_train_batch_start(self, batch, batch_idx):
        if self.interval == "step" or batch_idx == 0:
            self.rates.append(self.optimizers().param_groups[0]["lr"])

    def training_step(self, batch, batch_idx):
        if self.where == "step":
            self.log("metric", self.values.pop(0))
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        if self.where == "validation":
            self.log("metric", self.values.pop(0))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        config = {"scheduler": scheduler, "monitor": "metric", "interval": self.interval, **self.options}
        return {"optimizer": optimizer, "lr_scheduler": config}


@pytest.mark.parametrize("strict", [True, False])
def test_a_plateau_is_one_of_new_values(strict, local_trainer):
    better = Plateau([3.0, 2.0, 1.0], strict=strict)
    local_trainer(max_epochs=6, check_val_every_n_epoch=2, num_sanity_val_steps=0).fit(better, data(), data(4))
    assert better.rates == [1.0] * 6
    flat = Plateau([3.0, 3.0, 1.0], strict=strict)
    local_trainer(max_epochs=6, check_val_every_n_epoch=2, num_sanity_val_steps=0).fit(flat, data(), data(4))
    assert flat.rates == [1.0] * 4 + [0.5] * 2


def test_a_plateau_by_step(local_trainer):
    logged = Plateau([5.0, 4.0, 4.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0], "step", "step")
    local_trainer(max_epochs=1).fit(logged, data())
    assert logged.rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.125, 0.125, 0.0625, 0.03125]
    # of validations after batches 4 and 8, of which each counts once, and before the next batch
    validated = Plateau([2.0, 2.0], "step")
    local_trainer(max_epochs=1, val_check_interval=4, num_sanity_val_steps=0).fit(validated, data(), data(4))
    assert validated.rates == [1.0] * 8 + [0.5] * 2


def test_early_stopping_checks_new_values(local_trainer):
    stopping = EarlyStopping("metric", patience=2, check_on_train_epoch_end=True)
    module = Plateau([1.0] * 9)
    trainer = local_trainer(max_epochs=9, check_val_every_n_epoch=2, callbacks=stopping, num_sanity_val_steps=0)
    trainer.fit(module, data(), data(4))
    assert trainer.current_epoch == 6 and stopping.wait_count == 2


class Scored(Tiny):
    def validation_step(self, batch, batch_idx):
        self.log("score", float(self.global_step))

    def training_step(self, batch, batch_idx):
        self.log("train", 1.0 + self.current_epoch, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("at_epoch_end", [None, False, True])
@pytest.mark.parametrize(
    ("when", "options"),
    [
        ({"every_n_train_steps": 5}, {"val_check_interval": 5}),
        ({"every_n_train_steps": 10}, {}),
        ({"train_time_interval": timedelta(microseconds=1)}, {"val_check_interval": 5}),
        ({}, {}),
    ],
    ids=["steps", "steps at the end", "time", "epochs"],
)
def test_a_checkpoint_has_the_score_of_its_weights(when, options, at_epoch_end, local_trainer, tmp_path):
    name = "{step}-{score:.0f}"
    saver = ModelCheckpoint(tmp_path, name, "score", "max", save_top_k=-1, save_on_train_epoch_end=at_epoch_end, **when)
    local_trainer(max_epochs=2, callbacks=saver, num_sanity_val_steps=0, **options).fit(Scored(), data(), data(4))
    saved = sorted(path.name for path in tmp_path.iterdir())
    steps = [5, 10, 15, 20] if options else [10, 20]
    assert saved == sorted(f"step={step}-score={step}.ckpt" for step in steps)
    assert saver.best_model_score == 20.0


def test_training_metrics_in_names_are_of_the_epoch(local_trainer, tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}-{train:.0f}", "score", save_top_k=-1)
    local_trainer(max_epochs=3, callbacks=saver).fit(Scored(), data(), data(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"epoch={n}-train={n + 1}.ckpt" for n in range(3)]


# ---------------------------------------------------------------- an epoch ends once


class Hooks(Tiny):
    def note(self, hook):
        self.events.append(f"{hook} {self.current_epoch}")

    def on_train_epoch_start(self):
        self.note("start")

    def training_step(self, batch, batch_idx):
        self.note(f"batch {batch_idx} of")
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.note("validated")

    def on_train_epoch_end(self):
        self.note("end")

    def on_train_end(self):
        self.note("train end")

    def on_fit_end(self):
        self.note("fit end")

    def lr_scheduler_step(self, scheduler, metric):
        self.note("scheduler")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize(
    ("when", "options"),
    [
        ({}, {}),
        ({"every_n_train_steps": 1}, {}),
        ({"every_n_train_steps": 1}, {"limit_val_batches": 0}),
        ({"every_n_train_steps": 1}, {"val_check_interval": 2}),
        ({"every_n_train_steps": 1}, {"accumulate_grad_batches": 3}),
        ({"save_on_train_epoch_end": False}, {"val_check_interval": 2}),
        ({"save_on_train_epoch_end": True}, {}),
    ],
    ids=str,
)
def test_a_resumed_run_repeats_no_hook_and_leaves_none_out(when, options, local_trainer, tmp_path):
    options = {"limit_train_batches": 4, "num_sanity_val_steps": 0, **options}
    whole = Hooks()
    local_trainer(max_epochs=3, **options).fit(whole, data(), data(4))
    events = [event for event in whole.events if event not in ("t", "v", "|", "s")]
    saver = Saver(tmp_path, "{step}", save_top_k=-1, **when)
    local_trainer(max_epochs=2, callbacks=saver, **options).fit(Hooks(), data(), data(4))
    paths = list(tmp_path.iterdir())
    assert len(paths) >= 2
    for path in paths:
        resumed, progress = Hooks(), read_checkpoint(path)["progress"]
        local_trainer(max_epochs=3, **options).fit(resumed, data(), data(4), ckpt_path=path)
        found = [event for event in resumed.events if event not in ("t", "v", "|", "s")]
        assert found and found == events[-len(found) :], path
        batches = [event for event in found if event.startswith("batch")]
        assert len(batches) == 12 - progress["total_batches"], path
        begun = f"start {progress['epoch']}" in found
        assert begun == (progress["batch"] == 0), path
    assert events[-2:] == ["train end 3", "fit end 3"]


def test_a_run_that_ends_within_an_epoch_keeps_its_sums(local_trainer, tmp_path):
    class Mean(Tiny):
        def training_step(self, batch, batch_idx):
            self.log("mean", float(batch_idx), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    saver = ModelCheckpoint(tmp_path, save_last=True)
    local_trainer(max_steps=4, callbacks=saver).fit(Mean(), data())
    trainer = local_trainer(max_epochs=1)
    trainer.fit(Mean(), data(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.callback_metrics["mean"] == 4.5


# ---------------------------------------------------------------- digits


class Exact(Tiny):
    def validation_step(self, batch, batch_idx):
        self.log("large", 67128470.0 - self.current_epoch)
        self.log("count", torch.tensor(2**53 + 1), reduce_fx="max")
        self.log("total", 2**60, reduce_fx="sum")
        self.log("own", torch.tensor(0.1, dtype=torch.float64), reduce_fx=torch.median)


def test_numbers_keep_their_digits(local_trainer, tmp_path):
    trainer = local_trainer(max_epochs=8, callbacks=EarlyStopping("large", patience=1), limit_val_batches=2)
    trainer.fit(Exact(), data(), data(4))
    assert trainer.current_epoch == 8
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics == {"large": 67128463.0, "count": 2**53 + 1, "total": 2**61, "own": 0.1}
    assert trainer.callback_metrics["large"].dtype == torch.float64
    results = trainer.validate(Exact(), data(4), verbose=False)
    assert results == [{**metrics, "large": 67128462.0}]  # of the epoch that the fit has come to


# ---------------------------------------------------------------- requests


class Asking(Tiny):
    """Asks for the end in one hook, once."""

    def __init__(self, hook):
        super().__init__()
        self.hook = hook

    def ask(self, hook):
        if hook == self.hook:
            self.trainer.should_stop = True


def _hook(name):
    def hook(self, *args):
        self.ask(name)
        return getattr(super(Asking, self), name)(*args)

    return hook


STOPS = {
    "on_fit_start": "",
    "on_train_start": "",
    "on_train_epoch_start": "|",
    "on_train_batch_start": "1 v |",
    "on_before_zero_grad": "1 v |",
    "on_after_backward": "1 v |",
    "on_before_optimizer_step": "1 v |",
    "on_train_batch_end": "1 v |",
    "on_validation_start": "4 v |",
    "on_validation_epoch_end": "4 v |",
    "on_validation_end": "4 v |",
    "on_train_epoch_end": "4 v 4 v 2 |",
}
for _name in STOPS:
    setattr(Asking, _name, _hook(_name))


@pytest.mark.parametrize("hook", STOPS)
def test_a_stop_acts_after_the_batch_in_which_it_is_asked_for(hook, local_trainer):
    module = Asking(hook)
    trainer = local_trainer(max_epochs=9, min_epochs=0, val_check_interval=4, num_sanity_val_steps=0)
    trainer.fit(module, data(), data(4))
    assert module.story == STOPS[hook]
    assert trainer.should_stop


@pytest.mark.parametrize("where", ["on_save_checkpoint", "lr_scheduler_step"])
def test_a_stop_that_is_asked_for_between_batches_acts_after_the_next(where, local_trainer, tmp_path):
    """While a checkpoint is made, say: no report tells of it before the next batch does."""

    class Between(Tiny):
        def on_save_checkpoint(self, checkpoint):
            self.ask("on_save_checkpoint")

        def lr_scheduler_step(self, scheduler, metric):
            self.ask("lr_scheduler_step")

        def ask(self, hook):
            if hook == where:
                self.trainer.should_stop = True

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            plateau = {"scheduler": scheduler, "monitor": "val_loss", "interval": "step", "frequency": 2}
            return {"optimizer": optimizer, "lr_scheduler": plateau}

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    trainer = local_trainer(max_epochs=9, min_epochs=0, val_check_interval=2, callbacks=saving)
    trainer.fit(Between(), data(), data(2))
    assert (trainer.global_step, trainer.current_epoch) == (3, 0) and trainer.should_stop


def test_a_stop_that_is_taken_back_as_an_epoch_ends_is_not_told_of_again(local_trainer):
    """Workers have heard of it in the middle of the epoch."""

    class Looking(Tiny):
        seen: ClassVar[list] = []

        def on_train_epoch_end(self):
            self.seen.append(self.trainer.should_stop)

    def change(trainer, module):
        if trainer.current_epoch == 0 and not trainer.sanity_checking:
            trainer.should_stop = not trainer.should_stop

    asking = LambdaCallback(on_validation_end=change)
    trainer = local_trainer(max_epochs=3, min_epochs=2, val_check_interval=0.5, callbacks=asking)
    trainer.fit(Looking(), data(), data(2))
    assert trainer.current_epoch == 3 and not trainer.should_stop
    assert Looking.seen == [False] * 3


def test_a_stop_that_waits_for_the_minimum_says_so(local_trainer, caplog):
    class Early(WorkerCallback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = True

    with caplog.at_level(logging.INFO, "raytrainer"):
        trainer = local_trainer(max_epochs=9, callbacks=Early())
        trainer.fit(Tiny(), data())
    assert trainer.global_step == 10
    told = [record.getMessage() for record in caplog.records if "Asked to stop" in record.getMessage()]
    assert told == [
        "Asked to stop at step 1, in epoch 0; min_epochs=1 comes first. Trainer(min_epochs=0) stops at once."
    ]


def test_max_time_counts_one_fit(local_trainer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(chunks, "time", clock := Clock(100.0))

    class Slow(Tiny):
        def training_step(self, batch, batch_idx):
            clock.now += 10
            return super().training_step(batch, batch_idx)

    steps = []
    for _ in range(2):
        saver = ModelCheckpoint(tmp_path, save_last=True)
        trainer = local_trainer(max_time={"seconds": 150}, callbacks=saver)
        with caplog.at_level(logging.INFO, "raytrainer"):
            trainer.fit(Slow(), data(), ckpt_path="last")
        steps.append(trainer.global_step)
    assert 0 < steps[0] < steps[1]
    told = [record.getMessage() for record in caplog.records if "max_time is over" in record.getMessage()]
    assert [f"step {step}" in message for step, message in zip(steps, told, strict=True)] == [True, True]


def test_driver_callbacks_know_when_a_metric_was_logged(local_trainer):
    class Look(Callback):
        def __init__(self):
            self.times = []

        def on_train_epoch_end(self, trainer, module):
            self.times.append([trainer.metric_time(name) for name in ("score", "train")])

    look = Look()
    trainer = local_trainer(max_epochs=2, check_val_every_n_epoch=2, callbacks=look, num_sanity_val_steps=0)
    trainer.fit(Scored(), data(), data(4))
    first, second = look.times
    assert first[0] is None and (first[1].stage, first[1].batch) == ("train", 10)
    assert [(when.stage, when.batch) for when in second] == [("validate", 20), ("train", 20)]


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, [20, 40]),
        ({"max_epochs": 2, "val_check_interval": 5}, [5, 10, 15, 20]),
        ({"max_steps": 14}, [10, 14]),
        ({"max_steps": 14, "limit_val_batches": 0}, [10, 14]),
        ({"max_steps": 34, "check_val_every_n_epoch": 2}, [20]),
    ],
)
@pytest.mark.parametrize("monitor", [None, "step", "epoch"])
def test_what_needs_no_metric_is_saved_after_validations(monitor, options, saved, local_trainer, tmp_path):
    """As recorded with Lightning 2.6.6."""
    saver = ModelCheckpoint(tmp_path, "{step}", monitor, save_top_k=-1)
    local_trainer(num_sanity_val_steps=0, callbacks=saver, **options).fit(Tiny(), data(), data(4))
    assert sorted(int(path.stem.removeprefix("step=")) for path in tmp_path.iterdir()) == saved


class Outputs(Tiny):
    """Notes what `on_train_batch_end` is given."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.given, self.losses = kind, [], []
        self.automatic_optimization = not kind.startswith("manual")

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            self.manual_backward(loss)
            self.optimizers().step()
        kinds = {"tensor": loss, "dict": {"loss": loss, "extra": loss * 2}, "nothing": None}
        return kinds[self.kind.removeprefix("manual ")]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.given.append(outputs)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["tensor", "dict", "nothing", "manual tensor", "manual dict", "manual nothing"])
def test_outputs_of_a_batch_are_a_dict_with_the_loss_of_its_backward_pass(kind, accumulate, local_trainer):
    """As in Lightning, module and callbacks alike."""
    module = Outputs(kind)
    manual = kind.startswith("manual")
    seen = []
    beside = LambdaWorkerCallback(on_train_batch_end=lambda trainer, module, outputs, *args: seen.append(outputs))
    divisor = 1 if manual else accumulate
    local_trainer(max_epochs=1, callbacks=beside, accumulate_grad_batches=divisor).fit(module, data(6))
    assert len(seen) == len(module.given) == 3
    if kind.endswith("nothing"):
        assert seen == module.given == [{}] * 3
        return
    for outputs, loss in zip(module.given, module.losses, strict=True):
        assert outputs["loss"].item() == pytest.approx(loss / divisor) and not outputs["loss"].requires_grad
        assert set(outputs) == ({"loss", "extra"} if kind.endswith("dict") else {"loss"})


def test_hooks_see_that_the_driver_was_asked_to_stop(local_trainer):
    """By `EarlyStopping`, say, which the module has no part in."""

    class Looking(Tiny):
        seen: ClassVar[list] = []

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

        def on_train_epoch_end(self):
            self.seen.append((self.current_epoch, self.trainer.should_stop))

        def on_train_end(self):
            self.seen.append(("end", self.trainer.should_stop))

    stopping = EarlyStopping("val_loss", patience=1)
    local_trainer(max_epochs=9, callbacks=stopping).fit(Looking(), data(4), data(4))
    assert Looking.seen == [(0, False), (1, True), ("end", True)]


def test_batches_see_that_the_driver_was_asked_to_stop(local_trainer):
    """As `min_epochs` has it wait; a callback may take it back."""

    class Looking(Tiny):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_train_epoch_start(self):
            self.seen.append(("epoch", self.current_epoch, self.trainer.should_stop))

        def on_train_batch_start(self, batch, batch_idx):
            self.seen.append(("batch", self.current_epoch, self.trainer.should_stop))

        def on_validation_start(self):
            self.seen.append(("validation", self.current_epoch, self.trainer.should_stop))

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

    def change(trainer, module):
        if trainer.current_epoch in (0, 2):
            trainer.should_stop = trainer.current_epoch == 0

    asking = LambdaCallback(on_train_epoch_end=change)
    trainer = local_trainer(max_epochs=4, min_epochs=4, callbacks=asking, num_sanity_val_steps=0)
    trainer.fit(module := Looking(), data(2, 2), data(2))
    expected = [(epoch, epoch in (1, 2)) for epoch in range(4)]
    assert module.seen == [(what, *each) for each in expected for what in ("epoch", "batch", "validation")]
    assert not trainer.should_stop
