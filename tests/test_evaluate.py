"""validate, test and predict: results, several loaders, where data may come from."""

from __future__ import annotations

import pickle
from collections import namedtuple
from typing import ClassVar

import pytest
import torch
from tiny import Tiny, data, weights
from torch.utils.data import DataLoader

from raytrainer import Callback, ConfigurationError, DataModule

Pair = namedtuple("Pair", "x y")


class Mean(Tiny):
    def validation_step(self, batch, batch_idx):
        self.log("mean", batch.mean())

    def test_step(self, batch, batch_idx):
        self.log("mean", batch.mean())
        self.log("sum", batch.sum(), reduce_fx="sum")

    def predict_step(self, batch, batch_idx):
        return Pair(batch * 2, {"index": batch_idx})


def numbers(count, batch_size=4):
    return DataLoader(torch.arange(float(count)), batch_size=batch_size)


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_means_weigh_the_last_batch_by_its_size(verb, local_trainer):
    trainer = local_trainer()
    results = getattr(trainer, verb)(Mean(), numbers(10), verbose=False)
    assert results[0]["mean"] == 4.5 and len(results) == 1
    assert trainer.callback_metrics["mean"] == 4.5 and trainer.logged_metrics["mean"] == 4.5
    assert (trainer.state.fn, trainer.state.status) == (verb, "finished")


@pytest.mark.parametrize(
    ("verb", "limit", "expected"),
    [
        ("validate", {"limit_val_batches": 2}, [{"mean": 3.5}]),
        ("test", {"limit_test_batches": 0.5}, [{"mean": 1.5, "sum": 6.0}]),
        ("validate", {"limit_val_batches": 0}, []),
        ("test", {"limit_test_batches": 0}, []),
        ("predict", {"limit_predict_batches": 0}, []),
        ("validate", {"fast_dev_run": 1}, [{"mean": 1.5}]),
    ],
)
def test_limits(verb, limit, expected, local_trainer):
    loader = numbers(10 if verb == "validate" else 8)
    options = {} if verb == "predict" else {"verbose": False}
    assert getattr(local_trainer(**limit), verb)(Mean(), loader, **options) == expected


def test_several_loaders(local_trainer):
    class Each(Tiny):
        def test_step(self, batch, batch_idx, dataloader_idx):
            self.log("sum", batch.sum(), reduce_fx="sum")
            self.log("both", batch.sum(), reduce_fx="sum", add_dataloader_idx=False) if dataloader_idx == 0 else None

        def on_test_epoch_end(self):
            self.log("end", 1.0)

        def on_test_batch_end(self, outputs, batch, batch_idx, dataloader_idx):
            self.events.append((batch_idx, dataloader_idx))

    trainer, module = local_trainer(), Each()
    results = trainer.test(module, [numbers(6), numbers(3)], verbose=False)
    assert results == [
        {"sum/dataloader_idx_0": 15.0, "both": 15.0, "end": 1.0},
        {"sum/dataloader_idx_1": 3.0, "end": 1.0},
    ]
    assert module.events == [(0, 0), (1, 0), (0, 1)]
    assert trainer.num_test_batches == [2, 1]
    assert set(trainer.callback_metrics) == {"sum/dataloader_idx_0", "sum/dataloader_idx_1", "both", "end"}


def test_several_loaders_need_the_index(local_trainer):
    with pytest.raises(ConfigurationError, match=r"test_step\(batch, batch_idx\) with 2 loaders: add a dataloader_idx"):
        local_trainer().test(Mean(), [numbers(2), numbers(2)])


def test_predictions(local_trainer):
    trainer, module = local_trainer(), Mean()
    outputs = trainer.predict(module, numbers(10))
    assert [type(output) for output in outputs] == [Pair] * 3
    assert torch.equal(torch.cat([output.x for output in outputs]), 2 * torch.arange(10.0))
    assert [output.y["index"] for output in outputs] == [0, 1, 2]
    both = trainer.predict(_with_index(), [numbers(4), numbers(8)])
    assert [[list(item) for item in loader] for loader in both] == [[[0, 0]], [[0, 1], [1, 1]]]
    assert trainer.predict(module, numbers(10), return_predictions=False) is None


def _with_index():
    class Index(Tiny):
        def predict_step(self, batch, batch_idx, dataloader_idx):
            return batch_idx, dataloader_idx

    return Index()


def test_predict_calls_the_module_by_default(local_trainer):
    class Plain(Tiny):
        def forward(self, batch):
            assert not self.training and not torch.is_grad_enabled()
            return self.layer(batch[0])

    module = Plain()
    outputs = local_trainer().predict(module, data(6))
    expected = [module.layer(batch[0]) for batch in data(6)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_evaluation_changes_nothing(local_trainer):
    module = Tiny()
    module.layer.weight.grad = torch.ones_like(module.layer.weight)
    before = weights(module)
    trainer = local_trainer()
    trainer.validate(module, data(4), verbose=False)
    trainer.test(module, data(4), verbose=False)
    assert torch.equal(weights(module), before)
    assert module.layer.weight.grad is not None


def test_the_last_module_is_the_default(local_trainer):
    trainer, module = local_trainer(max_epochs=1), Tiny()
    with pytest.raises(ConfigurationError, match=r"validate\(\) needs a model"):
        trainer.validate(dataloaders=data(4))
    trainer.fit(module, data())
    expected = sum(module.loss(batch).item() for batch in data(4)) / 2
    assert trainer.validate(dataloaders=data(4), verbose=False)[0]["val_loss"] == pytest.approx(expected)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_what_is_needed(verb, local_trainer):
    with pytest.raises(
        ConfigurationError, match=rf"{verb} needs data: .*write {verb[:3] if verb == 'validate' else verb}_dataloader"
    ):
        getattr(local_trainer(), verb)(Tiny())
    if verb != "predict":
        module = Tiny()
        setattr(module, {"validate": "validation_step"}.get(verb, f"{verb}_step"), None)
        with pytest.raises(ConfigurationError, match=rf"Tiny has no .*step\(\); {verb} needs one"):
            getattr(local_trainer(), verb)(module, data(4))


def test_empty_loader(local_trainer, caplog):
    empty = DataLoader([], batch_size=2)
    trainer = local_trainer()
    assert trainer.test(Tiny(), empty) == [] == trainer.validate(Tiny(), empty)
    assert trainer.predict(Tiny(), empty) == []
    assert [r.getMessage() for r in caplog.records if "test loader has no batch" in r.getMessage()]


def test_one_of_several_loaders_is_empty(local_trainer):
    class Several(Tiny):
        def test_step(self, batch, batch_idx, dataloader_idx):
            self.log("mean", batch.mean())

    results = local_trainer().test(Several(), [DataLoader([]), numbers(8)], verbose=False)
    assert results == [{}, {"mean/dataloader_idx_1": 3.5}]


def test_fit_without_a_batch(local_trainer, caplog):
    """As in Lightning, a warning says so: nothing is trained, or nothing validated."""
    module = Tiny()
    trainer = local_trainer(max_epochs=2)
    trainer.fit(module, DataLoader([]), data(4))
    assert (trainer.global_step, trainer.current_epoch, trainer.state.status) == (0, 0, "finished")
    assert "The train loader has no batch" in caplog.text
    assert set(module.events) == {"s", "t"} - {"t"}
    module = Tiny()
    trainer = local_trainer(max_epochs=2)
    trainer.fit(module, data(4), DataLoader([]))
    assert (trainer.global_step, set(module.events)) == (4, {"t", "|"})
    assert "The val loader has no batch" in caplog.text


def test_printed_table(local_trainer, capsys):
    local_trainer().test(Mean(), numbers(8))
    printed = capsys.readouterr().out
    assert "mean" in printed and "3.5" in printed and "28" in printed
    local_trainer().test(Mean(), numbers(8), verbose=False)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- DataModule


class Numbers(DataModule):
    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append(f"setup {stage} {self.trainer.world_size}")

    def teardown(self, stage):
        self.calls.append(f"teardown {stage}")

    def train_dataloader(self):
        return data()

    def val_dataloader(self):
        return [data(4), data(6)]

    def test_dataloader(self):
        return data(4)

    def predict_dataloader(self):
        return data(2)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.calls.append((device.type, dataloader_idx))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class Two(Tiny):
    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def test_datamodule(local_trainer):
    dm, module, trainer = Numbers(), Two(), local_trainer(max_epochs=1)
    trainer.fit(module, datamodule=dm)
    assert dm.calls[:2] == ["prepare", "setup fit 1"] and dm.calls[-1] == "teardown fit"
    assert set(dm.calls[2:-1]) == {("cpu", 0), ("cpu", 1)}
    assert dm.trainer is trainer
    assert set(trainer.callback_metrics) == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}
    dm.calls.clear()
    # a trainer remembers where the data of its module came from
    assert len(trainer.validate(verbose=False)) == 2
    assert len(trainer.test(datamodule=dm, verbose=False)) == 1
    assert len(trainer.predict(module, dm)) == 1
    assert [call for call in dm.calls if isinstance(call, str)] == [
        text
        for stage in ("validate", "test", "predict")
        for text in ("prepare", f"setup {stage} 1", f"teardown {stage}")
    ]


def test_given_loaders_win_over_hooks(local_trainer):
    class Own(Tiny):
        def test_dataloader(self):
            raise AssertionError("not asked for")

    assert local_trainer().test(Own(), data(4), verbose=False)


def test_hooks_of_the_datamodule_win_over_the_modules(local_trainer):
    class Own(Two):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            raise AssertionError("not asked for")

        def test_dataloader(self):
            raise AssertionError("not asked for")

    local_trainer().test(Own(), datamodule=Numbers(), verbose=False)


def test_from_datasets(local_trainer):
    pairs = data(10).dataset
    dm = DataModule.from_datasets(pairs, val_dataset=[pairs, pairs], test_dataset={"a": pairs}, batch_size=5)
    module, trainer = Two(), local_trainer(max_epochs=1)
    trainer.fit(module, dm)
    assert trainer.num_training_batches == 2 and trainer.num_val_batches == [2, 2]
    assert len(trainer.test(module, dm, verbose=False)) == 1
    with pytest.raises(ConfigurationError, match="predict needs data"):
        trainer.predict(module, datamodule=dm)
    assert type(dm.train_dataloader().sampler).__name__ == "RandomSampler"


def test_from_datasets_of_a_derived_class():
    class Own(DataModule):
        def __init__(self, batch_size=1, extra=2):
            super().__init__()
            self.size, self.extra = batch_size, extra

        def test_dataloader(self):
            return "its own"

    dm = Own.from_datasets(data(10).dataset, batch_size=5, extra=7, drop_last=True)
    assert (type(dm), dm.size, dm.extra) == (Own, 5, 7)
    loader = pickle.loads(pickle.dumps(DataModule.from_datasets(data(4).dataset, batch_size=2))).train_dataloader()
    assert len(loader) == 2
    assert (dm.train_dataloader().batch_size, dm.train_dataloader().drop_last) == (5, True)
    assert dm.test_dataloader() == "its own"
    with pytest.raises(TypeError, match="extr"):
        Own.from_datasets([1], extr=7)

    class Any(DataModule):
        def __init__(self, **options):
            super().__init__()
            self.options = options

    assert Any.from_datasets(data(10).dataset, batch_size=5).options == {"batch_size": 5, "num_workers": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_dataloaders": Numbers(), "datamodule": Numbers()}, "two DataModules"),
        ({"datamodule": data()}, r"datamodule=DataLoader: give a raytrainer\.DataModule"),
    ],
)
def test_datamodules_that_do_not_fit(arguments, message, local_trainer):
    with pytest.raises(ConfigurationError, match=message):
        local_trainer().fit(Tiny(), **arguments)


def test_teardown_and_exception_hooks_after_an_error(local_trainer):
    class Failing(Two):
        def test_step(self, batch, batch_idx):
            raise ZeroDivisionError

    calls = []

    class Watching(Callback):
        def on_exception(self, trainer, module, exception):
            calls.append(type(exception))

        def teardown(self, trainer, module, stage):
            calls.append(stage)

    trainer = local_trainer(callbacks=Watching())
    with pytest.raises(ZeroDivisionError):
        trainer.test(Failing(), data(4))
    assert calls == [ZeroDivisionError, "test"] and trainer.state.status == "failed"


@pytest.mark.parametrize(("batches", "asked"), [(1, 1), (0, 0)])
def test_the_last_batch_is_known_to_be_the_last(batches, asked, local_trainer, monkeypatch):
    """Where a loader has a length, workers need not be asked whether there is another batch."""
    from raytrainer.driver.workers.local_group import LocalGroup

    told, call = [], LocalGroup.call
    monkeypatch.setattr(LocalGroup, "call", lambda *args, **kw: told.append(args[1].__name__) or call(*args, **kw))
    trainer = local_trainer(max_epochs=1, limit_val_batches=batches, num_sanity_val_steps=0)
    trainer.fit(Tiny(), data(8), data(8))
    verbs = ("start_evaluation", "evaluate", "leave_evaluation")
    assert [told.count(verb) for verb in verbs] == [asked] * 3


def test_an_empty_list_of_loaders_is_a_stage_that_does_nothing(local_trainer, caplog):
    class Nothing(Two):
        def val_dataloader(self):
            return []

    trainer = local_trainer(max_epochs=1)
    trainer.fit(Nothing(), data(4))
    assert trainer.global_step == 2 and trainer.validate(Nothing(), verbose=False) == []
    assert trainer.test(Nothing(), [], verbose=False) == trainer.predict(Nothing(), []) == []
    assert "There is no val loader: the list of them is empty." in caplog.text


def test_after_a_fit_an_evaluation_counts_as_that_has_ended(local_trainer):
    class Telling(Tiny):
        seen: ClassVar[list] = []

        def test_step(self, batch, batch_idx):
            self.seen.append((self.current_epoch, self.global_step))

    trainer, module = local_trainer(max_epochs=3), Telling()
    trainer.test(module, data(2), verbose=False)
    trainer.fit(module, data(4))
    trainer.test(module, data(2), verbose=False)
    assert Telling.seen == [(0, 0), (3, 6)]
