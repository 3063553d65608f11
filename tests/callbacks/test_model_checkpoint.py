from __future__ import annotations

import functools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Tiny, data

from raytrainer.callbacks.callback import Callback, WorkerCallback
from raytrainer.callbacks.model_checkpoint import ModelCheckpoint
from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.errors import ConfigurationError
from raytrainer.worker.worker import Worker


def stored(trainer: Any) -> list[str]:
    """Names of the stored checkpoints, without the folder."""
    return sorted(path.rpartition("/")[2] for path in trainer.stored)


def run(trainer: Any, callback: ModelCheckpoint, losses: list[float], name: str = "val_loss") -> None:
    callback.setup(trainer, None, "fit")
    callback.on_train_start(trainer, None)
    for loss in losses:
        trainer.epoch(callback, val={name: loss})
    callback.on_train_end(trainer, None)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({}, ["epoch=3-step=40.ckpt"]),
        ({"save_top_k": 0}, []),
        ({"save_top_k": 0, "save_last": True}, ["last.ckpt"]),
        ({"every_n_epochs": 0}, []),
        ({"every_n_epochs": 3}, ["epoch=2-step=30.ckpt"]),
        ({"save_top_k": -1, "every_n_epochs": 2}, ["epoch=1-step=20.ckpt", "epoch=3-step=40.ckpt"]),
        ({"filename": "best"}, ["best.ckpt"]),
        ({"monitor": "val_loss", "filename": "{epoch}"}, ["epoch=1.ckpt"]),
        ({"monitor": "val_loss", "filename": "{epoch}", "mode": "max"}, ["epoch=0.ckpt"]),
        ({"monitor": "val_loss", "filename": "{epoch}", "save_top_k": 2}, ["epoch=1.ckpt", "epoch=2.ckpt"]),
        ({"monitor": "val_loss", "filename": "best"}, ["best.ckpt"]),
        ({"monitor": "val_loss", "filename": "b", "save_top_k": 2}, ["b-v1.ckpt", "b.ckpt"]),
        ({"monitor": "val_loss", "filename": "{val_loss:.1f}", "save_last": True}, ["last.ckpt", "val_loss=1.0.ckpt"]),
        ({"monitor": "val_loss", "filename": "x{val_loss:.1f}", "auto_insert_metric_name": False}, ["x1.0.ckpt"]),
    ],
)
def test_what_is_kept(trainer, arguments, kept):
    run(trainer, ModelCheckpoint(**arguments), [4.0, 1.0, 2.0, 3.0])
    assert stored(trainer) == kept


def test_attributes(trainer, tmp_path):
    callback = ModelCheckpoint(tmp_path, "{epoch}", "val_loss", save_top_k=2)
    run(trainer, callback, [4.0, 1.0, 2.0, 3.0])
    assert callback.best_model_path == f"{tmp_path}/epoch=1.ckpt"
    assert callback.kth_best_model_path == f"{tmp_path}/epoch=2.ckpt"
    assert isinstance(callback.best_model_score, torch.Tensor) and callback.best_model_score.ndim == 0
    assert (callback.best_model_score, callback.current_score) == (1.0, 3.0)
    assert {path: score.item() for path, score in callback.best_k_models.items()} == {
        f"{tmp_path}/epoch=1.ckpt": 1.0,
        f"{tmp_path}/epoch=2.ckpt": 2.0,
    }


def test_without_monitor_the_latest_is_best(trainer):
    callback = ModelCheckpoint(filename="{epoch}")
    run(trainer, callback, [4.0, 1.0])
    assert callback.best_model_path.endswith("/epoch=1.ckpt")
    assert callback.best_model_score is None and callback.best_k_models == {}


def test_nan_is_worst(trainer):
    callback = ModelCheckpoint(monitor="val_loss", mode="max", filename="{epoch}", save_top_k=2)
    run(trainer, callback, [float("nan"), -5.0, -6.0, float("nan")])
    assert stored(trainer) == ["epoch=1.ckpt", "epoch=2.ckpt"]
    assert callback.best_model_score == -5.0


def test_slash_in_a_metric_makes_no_folder(trainer, tmp_path):
    run(trainer, ModelCheckpoint(tmp_path, "{val/loss:.1f}", "val/loss"), [0.5], name="val/loss")
    assert list(trainer.stored) == [f"{tmp_path}/val_loss=0.5.ckpt"]


def test_folder(trainer, tmp_path):
    run(trainer, ModelCheckpoint(filename="a"), [1.0])
    trainer.log_dir = f"{tmp_path}/logs/version_0"
    run(trainer, ModelCheckpoint(filename="a"), [1.0])
    run(trainer, ModelCheckpoint("s3://bucket/x/", filename="a"), [1.0])
    expected = [f"{tmp_path}/checkpoints", f"{tmp_path}/logs/version_0/checkpoints", "s3://bucket/x"]
    assert list(trainer.stored) == [f"{folder}/a.ckpt" for folder in expected]


def test_foreign_checkpoints_are_not_overwritten(trainer, tmp_path):
    trainer.stored = {f"{tmp_path}/a.ckpt": 7, f"{tmp_path}/last.ckpt": 7}
    run(trainer, ModelCheckpoint(tmp_path, "a", save_last=True), [1.0, 1.0])
    assert stored(trainer) == ["a-v1.ckpt", "a.ckpt", "last-v1.ckpt", "last.ckpt"]
    assert trainer.stored[f"{tmp_path}/a.ckpt"] == 7 and trainer.stored[f"{tmp_path}/last.ckpt"] == 7


def test_every_n_train_steps(trainer):
    callback = ModelCheckpoint(every_n_train_steps=4, filename="{step}", save_top_k=-1)
    assert callback.every_n_train_steps == 4 and ModelCheckpoint().every_n_train_steps is None
    callback.setup(trainer, None, "fit")
    saves: list[str] = []
    trainer.on_save = saves.append
    for steps in (0, 3, 1, 0, 2, 2):
        trainer.chunk(callback, steps)
    trainer.validate(callback, val_loss=1.0)
    callback.on_train_epoch_end(trainer, None)
    assert stored(trainer) == ["step=4.ckpt", "step=8.ckpt"] and len(saves) == 2


def test_a_step_that_jumps_over_the_interval(trainer):
    callback = ModelCheckpoint(every_n_train_steps=7, filename="{step}", save_top_k=-1)
    callback.setup(trainer, None, "fit")
    for _ in range(10):
        trainer.chunk(callback, 2)
    assert stored(trainer) == ["step=14.ckpt", "step=8.ckpt"]


def test_step_saves_wait_for_a_validation_of_these_weights(trainer, caplog):
    callback = ModelCheckpoint(
        every_n_train_steps=2, monitor="val_loss", filename="{step}-{val_loss:.0f}", save_top_k=-1
    )
    callback.setup(trainer, None, "fit")
    trainer.chunk(callback, 2)
    assert stored(trainer) == []
    trainer.chunk(callback, 1, validates=True)
    trainer.validate(callback, val_loss=3.0)  # two steps were saved for no validation, so here
    trainer.chunk(callback, 1)  # a value of other weights
    assert stored(trainer) == ["step=3-val_loss=3.ckpt"]
    trainer.chunk(callback, 2, validates=True)
    trainer.validate(callback, val_loss=6.0)
    assert stored(trainer) == ["step=3-val_loss=3.ckpt", "step=6-val_loss=6.ckpt"]
    assert not caplog.records


def test_step_saves_wait_for_a_new_value_of_training(trainer):
    callback = ModelCheckpoint(every_n_train_steps=2, monitor="loss", filename="{step}-{loss:.0f}", save_top_k=-1)
    callback.setup(trainer, None, "fit")
    trainer.log(loss=1.0)
    trainer.chunk(callback, 2)
    trainer.chunk(callback, 2)  # nothing logged
    assert stored(trainer) == ["step=2-loss=1.ckpt"]
    trainer.log(loss=4.0)
    trainer.chunk(callback, 1)
    assert stored(trainer) == ["step=2-loss=1.ckpt", "step=5-loss=4.ckpt"]


@pytest.mark.parametrize("monitor", ["step", "epoch"])
def test_counters_can_be_monitored(trainer, monitor):
    run(trainer, ModelCheckpoint(monitor=monitor, mode="max", save_top_k=2, filename="{epoch}"), [1.0, 1.0, 1.0])
    assert stored(trainer) == ["epoch=1.ckpt", "epoch=2.ckpt"]


@pytest.mark.parametrize("at_epoch_end", [None, False, True])
def test_a_validation_that_ends_an_epoch_is_saved_when_the_epoch_is_over(trainer, at_epoch_end):
    callback = ModelCheckpoint(monitor="val_loss", save_on_train_epoch_end=at_epoch_end)
    callback.setup(trainer, None, "fit")
    trainer.chunk(callback, 10)
    trainer.epoch_ended = True
    trainer.validate(callback, val_loss=1.0)
    assert trainer.stored == {}
    callback.on_train_epoch_end(trainer, None)
    assert len(trainer.stored) == 1 and callback.best_model_score == 1.0


@pytest.mark.parametrize(("at_epoch_end", "saved_at"), [(None, "validation"), (False, "validation"), (True, "epoch")])
def test_moment(trainer, at_epoch_end, saved_at):
    callback = ModelCheckpoint(save_on_train_epoch_end=at_epoch_end)
    callback.setup(trainer, None, "fit")
    trainer.global_step = 10
    trainer.validate(callback, val_loss=1.0)
    assert len(trainer.stored) == (saved_at == "validation")
    callback.on_train_epoch_end(trainer, None)
    assert len(trainer.stored) == 1


def test_without_validation_saves_after_the_epoch(trainer):
    trainer.num_val_batches = []
    callback = ModelCheckpoint(filename="{epoch}")
    callback.setup(trainer, None, "fit")
    trainer.epoch(callback)
    assert stored(trainer) == ["epoch=0.ckpt"]


def test_monitor_that_training_logs_is_taken_after_the_epoch(trainer):
    callback = ModelCheckpoint(monitor="loss", filename="{epoch}")
    callback.setup(trainer, None, "fit")
    for loss in (2.0, 1.0, 3.0):
        trainer.epoch(callback, train={"loss": loss}, val={"val_loss": 0.0})
    assert stored(trainer) == ["epoch=1.ckpt"] and callback.best_model_score == 1.0


def test_missing_monitor(trainer):
    callback = ModelCheckpoint(monitor="nope")
    trainer.epoch(callback, train={"loss": 1.0})  # validation may still bring it
    with pytest.raises(ConfigurationError, match=r"'nope'.*there are: loss, val_loss"):
        trainer.epoch(callback, val={"val_loss": 1.0})


@pytest.mark.parametrize("setting", ["sanity_checking", "fast_dev_run", "state"])
def test_does_nothing_outside_a_real_fit(trainer, setting):
    if setting == "state":
        trainer.state.fn = "validate"
    else:
        setattr(trainer, setting, True)
    callback = ModelCheckpoint(save_last=True, every_n_epochs=1)
    trainer.epoch(callback, val={"val_loss": 1.0})
    callback.on_train_end(trainer, None)
    assert trainer.stored == {}


def test_last_is_brought_up_to_date_at_the_end(trainer, tmp_path):
    callback = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=2)
    run(trainer, callback, [1.0, 1.0, 1.0])
    assert trainer.stored[callback.last_model_path] == 30
    assert callback.last_model_path == f"{tmp_path}/last.ckpt"


def test_never_removes_what_the_run_resumed_from(trainer, tmp_path):
    first = ModelCheckpoint(tmp_path, "{epoch}")
    run(trainer, first, [1.0])
    trainer.ckpt_path = f"{tmp_path}/epoch=0.ckpt/"
    resumed = ModelCheckpoint(tmp_path, "{epoch}")
    resumed.load_state_dict(first.state_dict())
    run(trainer, resumed, [1.0, 1.0])
    assert stored(trainer) == ["epoch=0.ckpt", "epoch=2.ckpt"]


def test_saves_before_it_removes_and_forgets_what_failed(trainer):
    callback = ModelCheckpoint(filename="{epoch}", monitor="val_loss", save_last=True)
    run(trainer, callback, [2.0])
    before = callback.state_dict()

    def fail(path: str) -> None:
        raise OSError("disk full")

    trainer.on_save = fail
    with pytest.raises(OSError, match="disk full"):
        trainer.epoch(callback, val={"val_loss": 1.0})
    assert stored(trainer) == ["epoch=0.ckpt", "last.ckpt"]
    assert callback.state_dict() == {**before, "current_score": 1.0}


def test_a_checkpoint_contains_its_own_record(trainer):
    callback = ModelCheckpoint(monitor="val_loss", filename="{epoch}", save_last=True)
    records: dict[str, Any] = {}
    trainer.on_save = lambda path: records.update({path: callback.state_dict()})
    run(trainer, callback, [1.0])
    best, last = records.items()
    assert best[1]["best_model_path"] == best[0] and best[1]["best_k_models"] == {best[0]: 1.0}
    assert last[1]["last_model_path"] == last[0]


@pytest.mark.parametrize("dirpath", ["here", None])
def test_resume_in_the_same_folder(trainer, tmp_path, dirpath):
    def make() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath and tmp_path / dirpath, "{epoch}", "val_loss", save_last=True)

    first, second = make(), make()
    run(trainer, first, [2.0, 1.0])
    second.load_state_dict(first.state_dict())
    run(trainer, second, [1.5, 0.5])
    assert stored(trainer) == ["epoch=3.ckpt", "last.ckpt"]
    assert second.best_model_score == 0.5


def test_resume_in_another_folder(trainer, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "raytrainer")
    first = ModelCheckpoint(tmp_path / "a", "{epoch}", "val_loss")
    second = ModelCheckpoint(tmp_path / "b", "{epoch}", "val_loss")
    run(trainer, first, [1.0])
    second.load_state_dict(first.state_dict())
    assert "folder changed" in caplog.text and second.best_model_path == ""
    run(trainer, second, [5.0])
    assert stored(trainer) == ["epoch=0.ckpt", "epoch=1.ckpt"]


def test_state_is_plain(trainer):
    callback = ModelCheckpoint(monitor="val_loss")
    run(trainer, callback, [1.0])
    plain = (str, float, int, dict, type(None))
    assert all(isinstance(value, plain) for value in callback.state_dict().values())


def test_a_second_fit_from_step_0_saves_again(trainer):
    callback = ModelCheckpoint(filename="{epoch}")
    run(trainer, callback, [1.0])
    trainer.global_step, trainer.current_epoch, trainer.stored = 0, 0, {}
    run(trainer, callback, [1.0])
    assert stored(trainer) == ["epoch=0.ckpt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "best"}, "mode='best'.*'min' and 'max'"),
        ({"save_top_k": -2}, "save_top_k=-2"),
        ({"save_top_k": 2}, "save_top_k=2, monitor=None"),
        ({"every_n_epochs": -1}, "every_n_epochs=-1"),
        ({"every_n_train_steps": -1}, "every_n_train_steps=-1"),
        ({"every_n_epochs": 1, "every_n_train_steps": 5}, "every_n_epochs=1, every_n_train_steps=5"),
        ({"filename": "{epoch"}, "filename"),
        ({"filename": "{}"}, "without a name"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ConfigurationError, match=words):
        ModelCheckpoint(**arguments)


def test_runs_last_and_has_its_own_key():
    assert ModelCheckpoint.runs_last
    assert ModelCheckpoint(monitor="a").state_key != ModelCheckpoint(monitor="b").state_key


def test_train_time_interval(trainer, monkeypatch):
    from datetime import timedelta

    clock = [100.0]
    monkeypatch.setattr("raytrainer.callbacks.model_checkpoint.time.monotonic", lambda: clock[0])
    callback = ModelCheckpoint(train_time_interval=timedelta(seconds=5), save_top_k=-1)
    callback.setup(trainer, None, "fit")
    callback.on_train_start(trainer, None)
    for seconds in (3, 3, 3, 3):  # 6 s after the start, and 6 s after that
        clock[0] += seconds
        trainer.global_step += 1
        callback.on_train_chunk_end(trainer, None, SimpleNamespace(steps=1))
    assert sorted(trainer.stored.values()) == [2, 4]
    trainer.epoch(callback, val={"x": 1.0})  # neither validations nor epochs save
    assert sorted(trainer.stored.values()) == [2, 4]
    assert "train_time_interval=0:00:05" in callback.state_key


@pytest.mark.parametrize("other", [{"every_n_epochs": 1}, {"every_n_train_steps": 2}])
def test_train_time_interval_excludes_the_others(other):
    from datetime import timedelta

    with pytest.raises(ConfigurationError, match="allowed is one of them"):
        ModelCheckpoint(train_time_interval=timedelta(minutes=1), **other)


@pytest.mark.parametrize("value", [5, "1m"])
def test_train_time_interval_is_a_timedelta(value):
    with pytest.raises(ConfigurationError, match="timedelta above zero"):
        ModelCheckpoint(train_time_interval=value)


# ---------------------------------------------------------------- names and failures


def test_names_of_last_and_of_files(tmp_path, local_trainer):
    class Own(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "{epoch}-last"
        FILE_EXTENSION = ".saved"

    saving = Own(tmp_path, save_last=True)
    local_trainer(max_epochs=3, callbacks=saving).fit(Tiny(), data())
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["epoch=2-last.saved", "epoch=2-step=30.saved"]
    assert saving.last_model_path == str(tmp_path / "epoch=2-last.saved")


@pytest.mark.parametrize(("counter", "names"), [(True, ["x-v1.ckpt", "x.ckpt"]), (False, ["x.ckpt"])])
def test_names_that_are_taken(counter, names, tmp_path, local_trainer):
    for steps in (1, 2):
        saving = ModelCheckpoint(tmp_path, "x", enable_version_counter=counter)
        local_trainer(max_steps=steps, callbacks=saving).fit(Tiny(), data())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == names
    assert read_checkpoint(saving.best_model_path)["global_step"] == 2


@pytest.mark.parametrize("save_last", [None, True, "link"])
@pytest.mark.parametrize("hook", ["training_step", "on_validation_epoch_end"])
def test_a_failed_run_is_saved_if_asked_for(hook, save_last, tmp_path, local_trainer):
    class Fails(Tiny):
        def training_step(self, batch, batch_idx):
            if hook == "training_step" and self.global_step == 13:
                raise ArithmeticError
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            if hook != "training_step" and self.global_step == 10:
                raise ArithmeticError

    saving = ModelCheckpoint(tmp_path / "a", save_on_exception=True, save_last=save_last, every_n_train_steps=100)
    with pytest.raises(ArithmeticError):
        local_trainer(max_epochs=2, callbacks=saving).fit(Fails(), data(), data(4))
    paths = sorted((tmp_path / "a").glob("*.ckpt"))
    assert len(paths) == 1 + bool(save_last)
    for path in paths:
        assert read_checkpoint(path)["global_step"] == (13 if hook == "training_step" else 10)
    assert f"step={13 if hook == 'training_step' else 10}" in paths[0].name
    module, trainer = Tiny(), local_trainer(max_epochs=2)
    trainer.fit(module, data(), data(4), ckpt_path=paths[0])
    assert trainer.global_step == 20
    with pytest.raises(ArithmeticError):
        local_trainer(max_epochs=2, callbacks=ModelCheckpoint(tmp_path / "b", every_n_train_steps=100)).fit(
            Fails(), data(), data(4)
        )
    assert not list((tmp_path / "b").glob("*.ckpt"))


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_end", "on_fit_end"])
@pytest.mark.parametrize("kind", [Callback, WorkerCallback])
def test_a_run_that_fails_between_epochs_or_at_its_end_goes_on_from_there(kind, hook, tmp_path, local_trainer):
    def fail(self, trainer, module):
        if hook != "on_train_epoch_start" or trainer.current_epoch == 2:
            raise ArithmeticError

    failing = type("Failing", (kind,), {hook: fail})()
    saving = ModelCheckpoint(tmp_path, "x", save_on_exception=True, every_n_epochs=7)
    module = Tiny()
    with pytest.raises(ArithmeticError):
        local_trainer(max_epochs=2 + (hook == "on_train_epoch_start"), callbacks=[failing, saving]).fit(module, data())
    goes_on, trainer = Tiny(), local_trainer(max_epochs=3)
    trainer.fit(goes_on, data(), ckpt_path=tmp_path / "x.ckpt")
    alone = Tiny()
    alone.load_state_dict(read_checkpoint(tmp_path / "x.ckpt")["state_dict"])
    assert torch.equal(alone.layer.weight, module.layer.weight)
    assert trainer.global_step == 30 and goes_on.story == "10 |"


def test_a_run_that_fails_before_it_goes_on_is_saved_where_it_began(tmp_path, local_trainer):
    class Fails(Callback):
        def on_train_start(self, trainer, module):
            raise ArithmeticError

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    local_trainer(max_epochs=1, callbacks=saving).fit(Tiny(), data())
    rescuing = ModelCheckpoint(tmp_path, "again", save_on_exception=True, every_n_epochs=7)
    with pytest.raises(ArithmeticError):
        local_trainer(max_epochs=1, callbacks=[Fails(), rescuing]).fit(
            Tiny(), data(), ckpt_path=tmp_path / "step=4.ckpt"
        )
    module = Tiny()
    local_trainer(max_epochs=1).fit(module, data(), ckpt_path=tmp_path / "again.ckpt")
    assert module.story == "6 |"


def test_last_is_one_of_three():
    with pytest.raises(ConfigurationError, match="save_last='copy'"):
        ModelCheckpoint(save_last="copy")


@pytest.mark.parametrize(
    ("options", "saves"),
    [
        ({}, True), ({"save_top_k": 0}, False), ({"save_top_k": 0, "save_last": True}, True),
        ({"every_n_epochs": 0}, False), ({"save_top_k": 0, "save_on_exception": True}, True),
    ],
    ids=str,
)  # fmt: skip
def test_memory_for_copies_is_set_aside_where_it_saves(options, saves, local_trainer, tmp_path, monkeypatch):
    asked = []
    noted = functools.wraps(Worker.prepare_capture)(lambda worker: asked.append(1))
    monkeypatch.setattr(Worker, "prepare_capture", noted)
    saver = ModelCheckpoint(tmp_path, **options)
    local_trainer(max_epochs=2, enable_checkpointing=True, callbacks=saver).fit(Tiny(), data())
    assert saver.saves is bool(asked) is saves
