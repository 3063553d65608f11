"""What a Trainer's arguments become, and which are refused, with the value, what is allowed and the remedy."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest

from raytrainer.errors import ConfigurationError
from raytrainer.plan.settings import build_settings


def test_defaults_are_the_contract():
    settings = build_settings()
    assert (settings.max_epochs, settings.min_epochs, settings.max_steps, settings.min_steps) == (1000, 1, None, None)
    assert (settings.check_val_every_n_epoch, settings.val_check_interval) == (1, 1.0)
    assert (settings.num_sanity_val_steps, settings.accumulate_grad_batches) == (2, 1)
    assert {settings.limit(stage) for stage in ("train", "val", "test", "predict")} == {1.0}
    assert (settings.gradient_clip_val, settings.gradient_clip_algorithm) == (None, "norm")
    assert (settings.precision, settings.deterministic, settings.benchmark) == ("32-true", False, None)


def test_frozen():
    with pytest.raises(AttributeError):
        build_settings().max_epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 1000 epochs only when nothing else limits the run
        ({"max_steps": 5}, {"max_epochs": None, "max_steps": 5}),
        ({"max_time": {"minutes": 1}}, {"max_epochs": None, "max_time": 60.0}),
        ({"max_steps": -1}, {"max_epochs": 1000, "max_steps": None}),
        ({"max_epochs": -1}, {"max_epochs": None}),
        ({"max_epochs": -1, "max_steps": 3}, {"max_epochs": None, "max_steps": 3}),
        ({"max_epochs": 3, "max_time": "00:00:01:00"}, {"max_epochs": 3, "max_time": 60.0}),
        ({"max_time": "01:02:03:04"}, {"max_time": 86400 + 7200 + 180 + 4.0}),
        ({"max_time": timedelta(seconds=1.5)}, {"max_time": 1.5}),
        ({"min_epochs": 0, "min_steps": 0}, {"min_epochs": 0, "min_steps": 0}),
        # an int is a number, a float a fraction, a larger whole float a number
        ({"limit_train_batches": 1}, {"limit_train_batches": 1}),
        ({"limit_train_batches": 1.0}, {"limit_train_batches": 1.0}),
        ({"limit_val_batches": 3.0}, {"limit_val_batches": 3}),
        ({"limit_test_batches": 0}, {"limit_test_batches": 0}),
        ({"limit_predict_batches": 0.0}, {"limit_predict_batches": 0.0}),
        ({"val_check_interval": 3.0}, {"val_check_interval": 3}),
        ({"val_check_interval": None}, {"val_check_interval": 1.0}),
        ({"num_sanity_val_steps": -1}, {"num_sanity_val_steps": -1}),
        ({"overfit_batches": 2}, {"limit_train_batches": 2, "limit_val_batches": 2, "overfit": True}),
        ({"overfit_batches": 2}, {"limit_test_batches": 1.0, "limit_predict_batches": 1.0}),
        ({"overfit_batches": 0.25}, {"limit_train_batches": 0.25, "limit_val_batches": 0.25, "overfit": True}),
        ({"overfit_batches": 0.0}, {"limit_train_batches": 1.0, "overfit": False}),
        ({"gradient_clip_val": 0}, {"gradient_clip_val": None}),
        ({"gradient_clip_val": 1}, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "norm"}),
        ({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, {"gradient_clip_algorithm": "value"}),
        ({"log_every_n_steps": None}, {"log_every_n_steps": 0}),
        ({"deterministic": "warn"}, {"deterministic": "warn"}),
        # where
        ({"strategy": "auto"}, {"strategy": "local", "world_size": 1}),
        ({"strategy": "auto", "cluster_attached": True}, {"strategy": "ddp", "world_size": 1}),
        ({"strategy": "local", "cluster_attached": True}, {"strategy": "local"}),
        ({"num_processes": 2}, {"strategy": "ddp", "world_size": 2}),
        ({"num_nodes": 3, "num_processes": 2}, {"strategy": "ddp", "world_size": 6}),
        ({"strategy": "ddp_cpu", "num_processes": 2}, {"strategy": "ddp", "on_gpu": False}),
        ({"strategy": "ddp_spawn", "num_processes": 2}, {"strategy": "ddp"}),
        ({"gpus": 2}, {"strategy": "ddp", "world_size": 2, "on_gpu": True}),
        ({"gpus": [3, 1], "num_nodes": 2}, {"gpus": (1, 3), "world_size": 4}),
    ],
)  # fmt: skip
def test_normal_forms(options, expected):
    settings = build_settings(**options)
    got = {name: getattr(settings, name) for name in expected}
    assert got == expected
    assert {name: type(value) for name, value in got.items()} == {n: type(v) for n, v in expected.items()}


@pytest.mark.parametrize(("fast", "batches"), [(True, 1), (3, 3), (1, 1)])
def test_fast_dev_run(fast, batches):
    settings = build_settings(fast_dev_run=fast, max_steps=100, val_check_interval=0.25, max_time={"hours": 1})
    assert settings.fast_dev_run == batches
    assert {settings.limit(stage) for stage in ("train", "val", "test", "predict")} == {batches}
    assert (settings.max_epochs, settings.max_steps, settings.max_time) == (1, None, None)
    assert (settings.num_sanity_val_steps, settings.val_check_interval) == (0, 1.0)


@pytest.mark.parametrize("fast", [False, 0])
def test_no_fast_dev_run(fast):
    assert build_settings(fast_dev_run=fast) == build_settings()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": -2}, r"max_epochs=-2: .*at least 0, or -1 for no limit"),
        ({"max_epochs": 1.5}, r"max_epochs=1\.5: give an integer"),
        ({"max_epochs": True}, r"max_epochs=True: give an integer"),
        ({"min_epochs": -1}, r"min_epochs=-1: .*at least 0"),
        ({"max_steps": -2}, r"max_steps=-2: .*-1 for no limit"),
        ({"min_steps": -1}, r"min_steps=-1: .*or None"),
        ({"max_time": "1:2:3"}, r"max_time='1:2:3': .*DD:HH:MM:SS"),
        ({"max_time": 30}, r"max_time=30: .*timedelta"),
        ({"max_time": {"parsecs": 1}}, r"max_time=.*parsecs"),
        ({"max_time": timedelta(seconds=-1)}, r"max_time=.*not negative"),
        ({"check_val_every_n_epoch": 0}, r"check_val_every_n_epoch=0: .*at least 1, or None"),
        ({"val_check_interval": 0}, r"val_check_interval=0: .*at least 1"),
        ({"val_check_interval": 0.0}, r"val_check_interval=0\.0: .*\(0, 1\]"),
        ({"val_check_interval": 1.5}, r"val_check_interval=1\.5"),
        ({"val_check_interval": -0.5}, r"val_check_interval=-0\.5"),
        ({"num_sanity_val_steps": -2}, r"num_sanity_val_steps=-2: .*-1 for the whole"),
        ({"limit_train_batches": -1}, r"limit_train_batches=-1: .*at least 0.*\[0, 1\]"),
        ({"limit_val_batches": 1.5}, r"limit_val_batches=1\.5: "),
        ({"limit_test_batches": True}, r"limit_test_batches=True: "),
        ({"limit_predict_batches": "all"}, r"limit_predict_batches='all': "),
        ({"overfit_batches": -1}, r"overfit_batches=-1: "),
        ({"fast_dev_run": -1}, r"fast_dev_run=-1: "),
        ({"gradient_clip_val": -1.0}, r"gradient_clip_val=-1\.0: .*greater than 0, or None"),
        ({"gradient_clip_val": float("nan")}, r"gradient_clip_val=nan: "),
        ({"gradient_clip_algorithm": "l2"}, r"gradient_clip_algorithm='l2': give one of 'norm', 'value'"),
        ({"accumulate_grad_batches": 0}, r"accumulate_grad_batches=0: .*at least 1"),
        ({"accumulate_grad_batches": {0: 2}}, r"accumulate_grad_batches="),
        ({"precision": 8}, r"precision=8: give 32, 64"),
        ({"deterministic": "yes"}, r"deterministic='yes': give one of False, True, 'warn'"),
        ({"deterministic": 1}, r"deterministic=1: give one of"),
        ({"benchmark": "fast"}, r"benchmark='fast': give True or False, or None"),
        ({"inference_mode": None}, r"inference_mode=None: give True or False"),
        ({"detect_anomaly": 1}, r"detect_anomaly=1: "),
        ({"use_distributed_sampler": None}, r"use_distributed_sampler=None: "),
        ({"reload_dataloaders_every_n_epochs": -1}, r"reload_dataloaders_every_n_epochs=-1: "),
        ({"seed": -1}, r"seed=-1: .*from 0 to 2\*\*63 - 1"),
        ({"seed": 1.0}, r"seed=1\.0: "),
        ({"log_every_n_steps": -1}, r"log_every_n_steps=-1: "),
        ({"strategy": "tpu"}, r"strategy='tpu': give one of 'auto', 'local', 'ddp'"),
        ({"num_nodes": 0}, r"num_nodes=0: .*at least 1"),
        ({"num_processes": 0}, r"num_processes=0: .*at least 1"),
        ({"gpus": [0, 0]}, r"gpus=\[0, 0\]: an index is given twice"),
        ({"gpus": "a"}, r"gpus='a': .*PCI bus order"),
        ({"gpus": -2}, r"gpus=-2: .*-1 for all"),
    ],
)
def test_refused_values(options, message):
    with pytest.raises(ConfigurationError, match=message):
        build_settings(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check_val_every_n_epoch": None}, r"val_check_interval=1\.0 with check_val_every_n_epoch=None.*an int"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 0.5}, r"0\.5 with check_val_every_n_epoch=None.*int"),
        ({"overfit_batches": 1, "limit_train_batches": 5}, r"overfit_batches=1 with limit_train_batches=5: .*one of"),
        ({"overfit_batches": 1, "limit_val_batches": 0}, r"overfit_batches=1 with limit_val_batches=0: .*one of"),
        ({"deterministic": True, "benchmark": True}, r"deterministic=True with benchmark=True: .*drop one"),
        ({"gpus": 1, "num_processes": 2}, r"gpus=1 with num_processes=2: .*drop num_processes"),
        ({"strategy": "ddp_cpu", "gpus": 1}, r'"ddp_cpu" with gpus=1: .*"ddp"'),
        ({"strategy": "local", "num_processes": 2}, r'"local" with 1 node.*2 worker.*use "ddp"'),
        ({"strategy": "local", "num_nodes": 2}, r'"local" with 2 node'),
    ],
)
def test_contradictory_pairs(options, message):
    with pytest.raises(ConfigurationError, match=message):
        build_settings(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 10, "max_epochs": 3}, "steps take precedence, so the run ends at 10 steps"),
        ({"strategy": "ddp_spawn", "num_processes": 2}, "Ray actors"),
    ],
)
def test_explained_in_a_log_line(options, message, caplog):
    with caplog.at_level(logging.INFO, "raytrainer"):
        logging.getLogger("raytrainer").addHandler(caplog.handler)
        try:
            build_settings(**options)
        finally:
            logging.getLogger("raytrainer").removeHandler(caplog.handler)
    assert message in caplog.text
