from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest

from raytrainer import DataModule, Module, WorkerCallback
from raytrainer.errors import ConfigurationError
from raytrainer.metrics.metric_store import MetricStore
from raytrainer.worker.hook_calls import Hooks, overridden
from raytrainer.worker.signatures import bind_batch_hook, bind_step


class Own(Module):
    def on_train_start(self):
        return "own"

    def val_dataloader(self):
        return []


class Mixin:
    def on_fit_start(self): ...


class Mixed(Mixin, Module): ...


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [
        (Module(), "on_train_start", False),
        (Own(), "on_train_start", True),
        (Own(), "on_train_end", False),
        (Own(), "val_dataloader", True),
        (Own(), "train_dataloader", False),
        (Mixed(), "on_fit_start", True),
        (DataModule(), "setup", False),
        (DataModule.from_datasets([1]), "train_dataloader", True),
        (DataModule.from_datasets([1]), "val_dataloader", False),
        (WorkerCallback(), "on_train_batch_end", False),
        (Own(), "no_such_hook", False),
    ],
)
def test_overridden(owner, name, expected):
    assert overridden(owner, name) is expected


def test_instance_attributes_and_none():
    module = Module()
    module.training_step = lambda batch: None
    assert overridden(module, "training_step")
    module.training_step = None
    assert not overridden(module, "training_step")


def make(module, *callbacks):
    view = SimpleNamespace(metrics=MetricStore(0, 1))
    return Hooks(view, module, callbacks), view


def test_nobody_overrode_it():
    hooks, _ = make(Module(), WorkerCallback())
    assert hooks.bind("on_train_start") is None
    assert hooks.call("on_train_start") is None


def test_callbacks_first_then_the_module_whose_answer_counts():
    seen = []

    class Noting(WorkerCallback):
        def on_train_start(self, trainer, module):
            seen.append((trainer, module, trainer.metrics.hook))
            return "callback"

    module = Own()
    hooks, view = make(module, Noting(), Noting())
    assert hooks.call("on_train_start") == "own"
    assert seen == [(view, module, "on_train_start")] * 2
    assert view.metrics.hook is None


def test_log_knows_the_innermost_hook_and_recovers_from_errors():
    hooks, view = make(Module())

    def inner():
        assert view.metrics.hook == "training_step"
        raise KeyError

    def outer():
        with pytest.raises(KeyError):
            hooks.guarded("training_step", inner)()
        assert view.metrics.hook == "optimizer_step"

    hooks.guarded("optimizer_step", outer)()
    assert view.metrics.hook is None


@pytest.mark.parametrize(
    ("function", "loaders", "expected"),
    [
        (lambda batch: (batch,), 1, ("b",)),
        (lambda batch, batch_idx: (batch, batch_idx), 1, ("b", 5)),
        (lambda x, i: (x, i), 1, ("b", 5)),
        (lambda batch, batch_idx=0: (batch, batch_idx), 1, ("b", 5)),
        (lambda batch, dataloader_idx: (batch, dataloader_idx), 2, ("b", 1)),
        (lambda batch, batch_idx, dataloader_idx: (batch, batch_idx, dataloader_idx), 2, ("b", 5, 1)),
        (lambda batch, batch_idx, dataloader_idx=0: (batch, batch_idx, dataloader_idx), 1, ("b", 5, 1)),
        (lambda *args: args, 2, ("b", 5, 1)),
        (lambda *args: args, 1, ("b", 5)),
        (lambda *args, **kwargs: args, 1, ("b", 5)),
        (lambda batch, *args: (batch, *args), 1, ("b", 5)),
        (lambda batch, *args: (batch, *args), 2, ("b", 5, 1)),
        (lambda batch, batch_idx, *args: (batch, batch_idx, *args), 1, ("b", 5)),
        (lambda batch, batch_idx, *args: (batch, batch_idx, *args), 2, ("b", 5, 1)),
        (lambda batch, batch_idx, scale=2.0: (batch, batch_idx, scale), 1, ("b", 5, 2.0)),
        (lambda batch, batch_idx, loader: (batch, batch_idx, loader), 1, ("b", 5, 1)),
        (lambda batch, *, dataloader_idx=0: (batch, dataloader_idx), 2, ("b", 1)),
        (lambda batch, batch_idx, *, dataloader_idx: (batch, batch_idx, dataloader_idx), 1, ("b", 5, 1)),
        (lambda batch, *, batch_idx, dataloader_idx: (batch, batch_idx, dataloader_idx), 2, ("b", 5, 1)),
        (functools.partial(lambda scale, batch, batch_idx: (scale, batch, batch_idx), 3), 1, (3, "b", 5)),
    ],
)
def test_steps_take_what_they_name(function, loaders, expected):
    assert bind_step(function, "validation_step", loaders)("b", 5, 1) == expected


@pytest.mark.parametrize(
    ("function", "loaders", "message"),
    [
        (lambda: None, 1, r"validation_step\(\): take \(batch\)"),
        (lambda a, b, c, d: None, 1, r"take \(batch\)"),
        (lambda dataloader_iter: None, 1, r"dataloader_iter is not supported: take"),
        (lambda batch, batch_idx, optimizer_idx: None, 1, r"optimizer_idx is not supported: set self.automatic_opt"),
        (lambda batch, batch_idx, hiddens: None, 1, r"hiddens is not supported"),
        (lambda **kwargs: None, 1, r"take \(batch\)"),
        (lambda batch: None, 2, r"2 loaders: add a dataloader_idx"),
        (lambda batch, batch_idx: None, 2, r"2 loaders: add a dataloader_idx"),
    ],
)
def test_refused_steps(function, loaders, message):
    with pytest.raises(ConfigurationError, match=message):
        bind_step(function, "validation_step", loaders)


@pytest.mark.parametrize(
    ("function", "loaders", "expected"),
    [
        (lambda batch, batch_idx: (batch, batch_idx), 1, ("b", 5)),
        (lambda batch, batch_idx, dataloader_idx: (batch, batch_idx, dataloader_idx), 1, ("b", 5, 1)),
        (lambda batch, batch_idx, dataloader_idx=7: (batch, batch_idx, dataloader_idx), 1, ("b", 5, 7)),
        (lambda batch, batch_idx, dataloader_idx=7: (batch, batch_idx, dataloader_idx), 2, ("b", 5, 1)),
        (lambda batch, batch_idx, *, dataloader_idx: (batch, batch_idx, dataloader_idx), 1, ("b", 5, 1)),
        (lambda batch, batch_idx, *, dataloader_idx: (batch, batch_idx, dataloader_idx), 2, ("b", 5, 1)),
        (lambda *args: args, 1, ("b", 5)),
        (lambda *args: args, 2, ("b", 5, 1)),
    ],
)
def test_hooks_take_what_they_name(function, loaders, expected):
    assert bind_batch_hook(function, "on_validation_batch_start", loaders)("b", 5, 1) == expected


def test_a_hook_that_cannot_tell_loaders_apart():
    with pytest.raises(ConfigurationError, match=r"batch, batch_idx\) with 2 loaders: add a dataloader_idx"):
        bind_batch_hook(lambda batch, batch_idx: None, "on_validation_batch_start", 2)
