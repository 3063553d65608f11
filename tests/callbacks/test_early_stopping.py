from __future__ import annotations

import logging

import pytest

from raytrainer.callbacks.early_stopping import EarlyStopping
from raytrainer.errors import ConfigurationError
from raytrainer.plan.early_stopping_rule import StopReason


def test_stops_after_patience_and_says_why(trainer, caplog):
    caplog.set_level(logging.INFO, "raytrainer")
    callback = EarlyStopping("val_loss", patience=2)
    callback.setup(trainer, None, "fit")
    for loss in (1.0, 0.5, 0.6):
        trainer.epoch(callback, val={"val_loss": loss})
        assert not trainer.should_stop
    trainer.epoch(callback, val={"val_loss": 0.7})
    assert trainer.should_stop
    assert (callback.stopped_epoch, callback.best_score.item(), callback.wait_count) == (3, 0.5, 2)
    assert callback.stopping_reason is StopReason.PATIENCE
    assert "val_loss has not improved" in caplog.text and "0.5" in caplog.text


def test_checks_once_an_epoch_after_validation(trainer):
    callback = EarlyStopping("val_loss", patience=9)
    trainer.epoch(callback, val={"val_loss": 1.0})
    trainer.validate(callback, val_loss=1.0)
    trainer.epoch(callback, val={"val_loss": 1.0})
    assert callback.wait_count == 2


def test_epoch_without_validation_is_not_checked(trainer):
    callback = EarlyStopping("val_loss", patience=9)
    trainer.epoch(callback)
    trainer.epoch(callback, val={"val_loss": 1.0})
    trainer.epoch(callback)
    assert callback.wait_count == 0


@pytest.mark.parametrize("seen_at_first_validation", [False, True])
def test_metric_that_training_logs_is_checked_after_the_epoch(trainer, seen_at_first_validation):
    callback = EarlyStopping("loss", patience=9)
    if seen_at_first_validation:
        trainer.log(loss=5.0)  # a step's value
    trainer.epoch(callback, train={"loss": 1.0}, val={"val_loss": 0.0})
    assert callback.best_score == 1.0
    trainer.epoch(callback, train={"loss": 0.5}, val={"val_loss": 0.0})
    assert (callback.best_score, callback.wait_count) == (0.5, 0)


@pytest.mark.parametrize("batches", [[], [0]])
def test_without_validation_checks_after_the_epoch(trainer, batches):
    trainer.num_val_batches = batches
    callback = EarlyStopping("loss")
    trainer.epoch(callback, train={"loss": 1.0})
    assert callback.best_score == 1.0


@pytest.mark.parametrize(("at_epoch_end", "waited"), [(True, 1), (False, 2)])
def test_moment_can_be_chosen(trainer, at_epoch_end, waited):
    callback = EarlyStopping("val_loss", patience=9, check_on_train_epoch_end=at_epoch_end)
    for _ in range(2):
        trainer.epoch(callback, val={"val_loss": 1.0})
    trainer.validate(callback, val_loss=1.0)
    trainer.validate(callback)  # nothing new
    assert callback.wait_count == waited


@pytest.mark.parametrize("setting", ["sanity_checking", "fast_dev_run", "state"])
def test_does_nothing_outside_a_real_fit(trainer, setting):
    if setting == "state":
        trainer.state.fn = "validate"
    else:
        setattr(trainer, setting, True)
    callback = EarlyStopping("val_loss", patience=0)
    trainer.validate(callback, val_loss=float("nan"))
    assert not trainer.should_stop and callback.wait_count == 0


def test_missing_metric_names_what_exists(trainer):
    callback = EarlyStopping("val_los")
    with pytest.raises(ConfigurationError, match=r"'val_los'.*there are: acc, val_loss"):
        trainer.epoch(callback, val={"val_loss": 1.0, "acc": 1.0})


def test_missing_metric_may_still_come(trainer):
    callback = EarlyStopping("val_loss")
    trainer.epoch(callback, train={"loss": 1.0})  # no validation in this epoch


def test_missing_metric_warns_once_if_not_strict(trainer, caplog):
    callback = EarlyStopping("nope", strict=False)
    for _ in range(3):
        trainer.epoch(callback, val={"val_loss": 1.0})
    assert caplog.text.count("nope") == 2  # both mentions in one message
    assert len(caplog.records) == 1


def test_state_survives(trainer):
    first = EarlyStopping("val_loss", patience=3)
    for loss in (0.3, 1.0, 1.0):
        trainer.epoch(first, val={"val_loss": loss})
    second = EarlyStopping("val_loss", patience=3)
    second.load_state_dict(first.state_dict())
    trainer.callback_metrics.clear()
    trainer.epoch(second, val={"val_loss": 0.3})  # as good as the best, in float32 too: no improvement
    assert trainer.should_stop and second.wait_count == 3


def test_state_keys_differ_by_metric():
    assert EarlyStopping("a").state_key != EarlyStopping("b").state_key


@pytest.mark.parametrize("arguments", [{"mode": "best"}, {"patience": -1}])
def test_bad_arguments(arguments):
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        EarlyStopping("x", **arguments)


@pytest.mark.parametrize("patience,stops", [(2, True), (3, False)])
@pytest.mark.parametrize("loss", [1.0, float("nan"), 0.1])
def test_a_stopped_run_stops_again_where_it_goes_on(trainer, loss, patience, stops):
    rules = {"stopping_threshold": 0.2} if loss == 0.1 else {}
    first = EarlyStopping("val_loss", patience=2, **rules)
    for value in (0.5, 0.6, loss):
        trainer.epoch(first, val={"val_loss": value})
    assert trainer.should_stop
    state, reason = first.state_dict(), first.stopping_reason
    first.teardown(trainer, None, "fit")
    limits = {} if stops else {"check_finite": False}
    for callback, loads in (
        (EarlyStopping("val_loss", patience=patience, **limits, **(rules if stops else {})), True),
        (first, False),  # another fit, from the beginning
    ):
        trainer.should_stop = False
        if loads:
            callback.load_state_dict(state)
        callback.on_fit_start(trainer, None)
        assert trainer.should_stop == (stops and loads)
        assert not trainer.should_stop or callback.stopping_reason is reason
