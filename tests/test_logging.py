"""What `self.log` becomes on the driver: metrics, rows of the loggers, and what fails harmlessly."""

from __future__ import annotations

import logging
import signal

import pytest
import torch
from tiny import Tiny, data

from raytrainer import Callback, Logger, MetricError, OnExceptionCheckpoint, ProgressBar
from raytrainer.worker.worker_run import WorkerRun


class Rows(Logger):
    """Keeps what it is given."""

    def __init__(self):
        self.rows, self.hparams, self.ended = [], None, None

    def log_rows(self, rows):
        self.rows += rows

    def log_metrics(self, metrics, step=None):
        raise AssertionError("rows come together")

    def log_hyperparams(self, params):
        self.hparams = params

    def finalize(self, status):
        self.ended = status


class Logging(Tiny):
    def training_step(self, batch, batch_idx):
        self.log("loss", float(batch_idx), prog_bar=True, on_epoch=True)
        self.log("step", float(batch_idx))
        self.log("epoch", float(batch_idx), on_step=False, on_epoch=True)
        self.log("hidden", 1.0, logger=False)
        self.log_dict({"a": 1.0, "b": 2.0}, on_step=False, on_epoch=True)
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val", float(batch_idx))
        self.log("both", float(batch_idx), on_step=True, on_epoch=True)


def test_metrics_by_name(local_trainer):
    trainer = local_trainer(max_epochs=1, limit_train_batches=4, log_every_n_steps=1)
    trainer.fit(Logging(), data(), data(4))
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics == {
        "loss": 1.5, "loss_step": 3.0, "loss_epoch": 1.5, "step": 3.0, "epoch": 1.5, "hidden": 1.0, "a": 1.0, "b": 2.0,
        "val": 0.5, "both": 0.5, "both_epoch": 0.5,
    }  # fmt: skip
    logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
    assert logged == {n: v for n, v in metrics.items() if n not in ("loss", "hidden", "both")} | {"both_step": 1.0}
    assert trainer.progress_bar_metrics == {"loss_step": 3.0, "loss_epoch": 1.5}
    assert all(isinstance(v, torch.Tensor) and v.ndim == 0 for v in trainer.callback_metrics.values())


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [3]), (None, [])])
def test_rows(every, steps, local_trainer):
    logger = Rows()
    trainer = local_trainer(max_epochs=2, limit_train_batches=3, log_every_n_steps=every, logger=logger)
    trainer.fit(Logging(), data(), data(4))
    assert [step for step, values in logger.rows if "step" in values] == steps
    assert all(values["step"] == float(step % 3) for step, values in logger.rows if "step" in values)
    assert all(values["epoch"] == step // 3 for step, values in logger.rows if "step" in values)
    epochs = [(step, values["loss_epoch"]) for step, values in logger.rows if "loss_epoch" in values]
    assert epochs == [(2, 1.0), (5, 1.0)]
    assert [step for step, values in logger.rows if "val" in values] == [2, 5]
    assert not any("hidden" in values for _, values in logger.rows)
    assert logger.ended == "success"


class Watch(Callback):
    """Steps whose rows the logger has, at each hook; saves where a chunk ends in the middle of an epoch."""

    def __init__(self, logger, path):
        self.logger, self.path, self.seen = logger, path, []

    def have(self):
        return sum("step" in values for _, values in self.logger.rows)

    def on_train_chunk_end(self, trainer, module, report):
        self.seen.append(("chunk", report.batch, self.have()))
        if report.behind and report.batch == 1:
            trainer.save_checkpoint(self.path)
            self.seen.append(("saved", report.batch, self.have()))

    def on_validation_start(self, trainer, module):
        self.seen.append(("validation", trainer.global_step, self.have()))


@pytest.fixture
def ahead(monkeypatch):
    """As on a GPU, which has work while a chunk is reported; chunks of 1, then 3 batches."""
    monkeypatch.setattr(WorkerRun, "ahead", property(lambda self: True, lambda self, value: None), raising=False)
    waited_for = []
    monkeypatch.setattr(
        "raytrainer.plan.steps_and_epochs.chunk_batches", lambda batches, _: waited_for.append(batches) or 3
    )
    return waited_for


def test_a_chunk_leaves_its_last_batch_to_the_next(ahead, local_trainer, tmp_path):
    logger = Rows()
    watch = Watch(logger, tmp_path / "x.ckpt")
    trainer = local_trainer(max_epochs=1, log_every_n_steps=1, logger=logger, callbacks=[watch], val_check_interval=6)
    trainer.fit(Logging(), data(20), data(4))
    assert watch.seen == [
        ("validation", 0, 0), ("chunk", 1, 0), ("saved", 1, 1), ("chunk", 4, 3), ("chunk", 6, 6), ("validation", 6, 6),
        ("chunk", 9, 8), ("chunk", 10, 10),
    ]  # fmt: skip
    assert [(step, values["step"]) for step, values in logger.rows if "step" in values] == [
        (i, float(i)) for i in range(10)
    ]
    assert trainer.callback_metrics["loss_epoch"] == trainer.callback_metrics["epoch"] == 4.5
    assert trainer.callback_metrics["both"] == 0.5
    resumed = local_trainer(max_epochs=1, log_every_n_steps=1, logger=(again := Rows()))
    resumed.fit(Logging(), data(20), data(4), ckpt_path=watch.path)
    assert [step for step, values in again.rows if "step" in values] == list(range(1, 10))
    assert resumed.callback_metrics["epoch"] == 4.5


def test_chunks_are_sized_by_the_batches_that_were_waited_for(ahead, local_trainer):
    bar, logger = ProgressBar(metrics="*"), Rows()  # which look at what there is, and wait for nothing
    local_trainer(max_epochs=1, callbacks=[bar], logger=logger, enable_progress_bar=True).fit(Logging(), data(20))
    assert ahead == [0, 3, 3, 4]
    ahead.clear()
    local_trainer().validate(Logging(), data(20))
    assert ahead == [0, 3, 3, 4]  # whose last batch is known to be the last


class Failing(Logging):
    """Fails at a batch; or its callback does, at the end of the chunk before."""

    fails_at = 6

    def __init__(self, error=ZeroDivisionError):
        super().__init__()
        self.error = error

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == self.fails_at:
            raise self.error
        return loss


class FailsAfterStep(Failing):
    """Fails when the weights have had the batch."""

    training_step = Logging.training_step

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == self.fails_at:
            raise self.error


class FailsAtChunk(Callback):
    def on_train_chunk_end(self, trainer, module, report):
        if report.batch == 4:
            assert trainer.callback_metrics["step"] == 3.0, "whoever looks waits for the last batch"
            raise ZeroDivisionError


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("batch", ZeroDivisionError),
        ("batch", KeyboardInterrupt),
        ("after", ZeroDivisionError),
        ("after", KeyboardInterrupt),
        ("callback", ZeroDivisionError),
    ],
)
def test_what_a_failed_run_has_logged_is_whole(where, error, ahead, local_trainer, tmp_path):
    logger, done = Rows(), {"batch": 6, "after": 7, "callback": 4}[where]
    callbacks = [OnExceptionCheckpoint(tmp_path), *([FailsAtChunk()] if where == "callback" else [])]
    trainer = local_trainer(max_epochs=1, log_every_n_steps=1, logger=logger, callbacks=callbacks)
    with pytest.raises(error):
        trainer.fit((FailsAfterStep if where == "after" else Failing)(error), data(20))
    assert [step for step, values in logger.rows if "step" in values] == list(range(done))
    resumed = local_trainer(max_epochs=1, log_every_n_steps=1, logger=(again := Rows()))
    resumed.fit(Logging(), data(20), ckpt_path=tmp_path / "on_exception.ckpt")
    assert [step for step, values in again.rows if "step" in values] == list(range(done, 10))
    assert resumed.callback_metrics["epoch"] == 4.5
    assert resumed.global_step == 10


def test_rows_up_to_an_error(local_trainer):
    logger = Rows()
    with pytest.raises(ZeroDivisionError):
        local_trainer(max_epochs=1, log_every_n_steps=1, logger=logger).fit(Failing(), data(20))
    assert [step for step, values in logger.rows if "step" in values] == list(range(6))


def test_an_interrupted_validation_keeps_its_rows(ahead, local_trainer):
    class Interrupts(Callback):
        def on_evaluation_chunk_end(self, trainer, module, report):
            if report.batches == 4:
                signal.raise_signal(signal.SIGINT)

    logger = Rows()
    local_trainer(log_every_n_steps=1, logger=logger, callbacks=[Interrupts()]).validate(Logging(), data(20))
    assert [step for step, values in logger.rows if "both_step" in values] == [0, 1, 2, 3]


@pytest.mark.parametrize("end", ["stop", "max_steps", "interrupt"])
def test_no_row_is_lost_where_training_ends_early(end, ahead, local_trainer):
    class End(Callback):
        def on_train_chunk_end(self, trainer, module, report):
            trainer.should_stop |= end == "stop"
            if end == "interrupt":
                signal.raise_signal(signal.SIGINT)

    logger = Rows()
    options = (
        {"max_steps": 4, "max_epochs": None}
        if end == "max_steps"
        else {"max_epochs": 1, "min_epochs": 0, "callbacks": [End()]}
    )
    local_trainer(log_every_n_steps=1, logger=logger, **options).fit(Logging(), data(20))
    steps = [step for step, values in logger.rows if "step" in values]
    assert steps == list(range(4 if end == "max_steps" else 1))


def test_steps_of_rows_count_optimizer_steps(local_trainer):
    logger = Rows()
    trainer = local_trainer(max_epochs=1, accumulate_grad_batches=4, log_every_n_steps=1, logger=logger)
    trainer.fit(Logging(), data())
    assert [(step, v["step"]) for step, v in logger.rows if "step" in v] == [(0, 3.0), (1, 7.0), (2, 9.0)]


def test_the_order_of_rows_does_not_depend_on_chunks(local_trainer, monkeypatch):
    rows = []
    for chunk in (None, 1, 5):
        if chunk:
            monkeypatch.setattr("raytrainer.plan.steps_and_epochs.chunk_batches", lambda *a, chunk=chunk, **k: chunk)
        logger = Rows()
        local_trainer(max_epochs=2, log_every_n_steps=2, logger=logger, val_check_interval=3).fit(
            Logging(), data(), data(4)
        )
        rows.append(logger.rows)
    assert rows[0] == rows[1] == rows[2]


def test_metrics_are_current_wherever_they_are_looked_at(local_trainer):
    seen = []

    class Looking(Logging):
        def on_train_epoch_end(self):
            seen.append(("module", float(self.trainer.callback_metrics["epoch"])))

    class Watching(Callback):
        def on_validation_end(self, trainer, module):
            seen.append(("val", float(trainer.callback_metrics["val"])))

        def on_train_epoch_end(self, trainer, module):
            seen.append(("train", float(trainer.callback_metrics["epoch"])))

    trainer = local_trainer(max_epochs=1, callbacks=Watching(), num_sanity_val_steps=0)
    trainer.fit(Looking(), data(), data(4))
    assert seen == [("val", 0.5), ("module", 4.5), ("train", 4.5)]


def test_values_of_an_epoch_across_validations(local_trainer):
    trainer = local_trainer(max_epochs=1, val_check_interval=2)
    trainer.fit(Logging(), data(), data(4))
    assert trainer.callback_metrics["epoch"] == 4.5


def test_metrics_of_a_child_module(local_trainer):
    """A Module inside a Module logs, and knows its trainer, as Lightning's does."""

    class Outer(Tiny):
        def __init__(self):
            super().__init__()
            self.inner = Logging()

        def training_step(self, batch, batch_idx):
            assert self.inner.trainer is self.trainer and self.inner.device == self.device
            self.inner.log("inner", 2.0)
            return self.loss(batch)

    module = Outer()
    trainer = local_trainer(max_epochs=1)
    trainer.fit(module, data())
    assert trainer.callback_metrics["inner"] == 2.0
    assert module.inner.trainer is trainer


def test_hyperparameters_reach_the_loggers_once(local_trainer):
    class Saving(Tiny):
        def __init__(self, width=3, secret="x"):
            super().__init__()
            self.save_hyperparameters(ignore="secret")

    logger = Rows()
    local_trainer(max_epochs=1, logger=[logger]).fit(Saving(5), data())
    assert logger.hparams == {"width": 5}


class Broken(Logger):
    def log_metrics(self, metrics, step=None):
        raise OSError("disk full")

    def log_hyperparams(self, params):
        raise OSError("disk full")

    def finalize(self, status):
        raise OSError("disk full")


def test_a_failing_logger_does_not_end_training(local_trainer, caplog):
    good, module = Rows(), Logging()
    module.save_hyperparameters({"x": 1})
    root = logging.getLogger("raytrainer")
    root.addHandler(caplog.handler)
    try:
        trainer = local_trainer(max_epochs=1, logger=[Broken(), good], log_every_n_steps=1)
        trainer.fit(module, data())
    finally:
        root.removeHandler(caplog.handler)
    assert trainer.state.finished and trainer.global_step == 10
    assert "Broken failed, training goes on: OSError: disk full" in caplog.text
    assert good.rows and good.ended == "success"


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_loggers_are_told_how_it_ended(error, local_trainer):
    class Failing(Logging):
        def on_train_epoch_end(self):
            raise error

    logger = Rows()
    with pytest.raises(error):
        local_trainer(max_epochs=1, logger=logger).fit(Failing(), data())
    assert logger.ended != "success"


def test_log_where_it_is_not_allowed(local_trainer):
    class Predicting(Tiny):
        def predict_step(self, batch, batch_idx):
            self.log("x", 1.0)

    with pytest.raises(MetricError, match="predict_step"):
        local_trainer().predict(Predicting(), data(4))


def test_the_loader_is_no_part_of_a_name_that_is_given(local_trainer):
    class Named(Tiny):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log(f"x/dataloader_idx_{dataloader_idx}", 1.0)

    with pytest.raises(MetricError, match="add_dataloader_idx=False"):
        local_trainer().validate(Named(), [data(4), data(4)])
