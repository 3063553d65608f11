"""What is said where a hook returns, or takes, what it should not: the hook, what it returned, what to return."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from tiny import Tiny, data
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import raytrainer as rt
from raytrainer.errors import CheckpointError, ConfigurationError, DataError


def returning(hook: str, value: object, base: type = Tiny, **others: object) -> rt.Module:
    return type("Odd", (base,), {hook: lambda self, *args, **kwargs: value, **others})()


def sgd(module, **options):
    return torch.optim.SGD(module.parameters(), 0.1, **options)


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"])
@pytest.mark.parametrize("verb", ["fit", "validate", "predict"])
def test_a_forgotten_return_of_a_batch(local_trainer, hook, verb):
    with pytest.raises(ConfigurationError, match=f"{hook} returned None: return the batch"):
        getattr(local_trainer(max_epochs=1), verb)(returning(hook, None), data())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda m: torch.optim.SGD, "returned SGD, a class"),
        (lambda m: {"optimizer": "adam"}, r"returned {'optimizer': 'adam'}: give an optimizer, such as"),
        (lambda m: {}, r"a dict with keys \[\]: it needs 'optimizer'"),
        (lambda m: (sgd(m), StepLR(sgd(m), 1)), r"StepLR\(...\) as an optimizer: return \(\[optimizer\], \["),
        (lambda m: ([sgd(m)], [StepLR]), r"lr_scheduler StepLR, a class: give StepLR\(optimizer"),
        (lambda m: [sgd(m), None], "returned None as an optimizer: return an optimizer, a list"),
        (lambda m: StepLR(sgd(m), 1), r"returned StepLR\(...\) alone: return \(\[optimizer\], \[scheduler\]\)"),
    ],
)  # fmt: skip
def test_configure_optimizers(local_trainer, answer, message):
    class Odd(Tiny):
        def configure_optimizers(self):
            return answer(self)

    with pytest.raises(ConfigurationError, match=message):
        local_trainer(max_epochs=1).fit(Odd(), data())


def test_an_optimizer_of_other_parameters_is_warned_of(local_trainer, caplog):
    class Odd(Tiny):
        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), torch.zeros(2, requires_grad=True)], 0.1)

    local_trainer(max_epochs=1).fit(Odd(), data())
    own = len(list(Odd().parameters()))
    assert f"1 of the {own + 1} tensors of SGD are no parameters of this Odd" in caplog.text
    caplog.clear()
    local_trainer(max_epochs=1).fit(Tiny(), data())
    assert "no parameters" not in caplog.text


@pytest.mark.parametrize("stage", ["train", "val"])
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ("train.csv", "'train.csv', a text"),
        (DataLoader, "DataLoader, a class: give an object"),
        (TensorDataset(torch.ones(4, 4)), r"a TensorDataset, which is no loader: give DataLoader\(dataset"),
        (
            torch.ones(16, 4),
            r"a Tensor of shape \(16, 4\), whose rows would be taken for batches: give DataLoader\(Ten",
        ),
        (3, "loader is 3: give a DataLoader"),
        ([data(), None], "a list of loaders, in which number 1 is None"),
        ({"a": data(), "b": 3}, "a dict whose values are not all loaders .*'b': a int"),
        (lambda: data(), "which is not called here: give what it returns"),
    ],
)
def test_what_is_no_loader(local_trainer, stage, loader, message):
    """From the hook, and handed over."""
    if stage == "train":
        given, hooks = [loader], {"train_dataloader": lambda self: loader}
    else:
        given, hooks = (
            [data(), loader],
            {"train_dataloader": lambda self: data(), "val_dataloader": lambda self: loader},
        )
    with pytest.raises(DataError, match=f"the {stage} loader is .*{message.partition('loader is ')[2] or message}"):
        local_trainer(max_epochs=1).fit(type("Odd", (Tiny,), hooks)())
    with pytest.raises(DataError, match=f"the {stage} loader is"):
        local_trainer(max_epochs=1).fit(Tiny(), *given)


class Lightnings:
    """Stand-ins by the names that Lightning's classes have."""

    @staticmethod
    def object(kind: str) -> object:
        return type("Old", (type(kind, (), {"__module__": "lightning.pytorch.somewhere"}),), {})()


@pytest.mark.parametrize(
    ("datamodule", "message"),
    [
        (rt.DataModule, r"datamodule=DataModule, a class: give an object of it, such as DataModule\(\)"),
        (data(), r"datamodule=DataLoader: .*fit\(module, train_loader"),
        (Lightnings.object("LightningDataModule"), "LightningDataModule of Lightning's: derive it"),
        (3, "datamodule=int: give a raytrainer.DataModule"),
    ],
)  # fmt: skip
def test_datamodules(local_trainer, datamodule, message):
    with pytest.raises(ConfigurationError, match=message):
        local_trainer(max_epochs=1).fit(Tiny(), datamodule=datamodule)
    if "Lightning" in message:
        with pytest.raises(ConfigurationError, match=message):
            local_trainer(max_epochs=1).fit(Tiny(), datamodule)


def test_a_callback_of_lightnings():
    with pytest.raises(ConfigurationError, match="callback Old is Lightning's: take raytrainer's, or derive it from"):
        rt.Trainer(callbacks=[Lightnings.object("Callback")])


def test_a_state_dict_that_is_none(local_trainer, tmp_path):
    trainer = local_trainer(max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    with pytest.raises(ConfigurationError, match=r"Odd.state_dict\(\) returned NoneType: return the dict"):
        trainer.fit(returning("state_dict", None), data())


def test_an_epoch_that_trains_nothing_is_warned_of(local_trainer, caplog):
    def told(module):
        caplog.clear()
        local_trainer(max_epochs=2).fit(module, data())
        return [r.getMessage() for r in caplog.records if "none of its batches" in r.getMessage()]

    class Manual(Tiny):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            pass

    class Half(Tiny):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx == 3 else None

    with caplog.at_level(logging.WARNING, "raytrainer"):
        (nothing,) = told(returning("training_step", None))
        assert nothing.startswith("Epoch 0 trained on none of its batches: training_step returned None")
        (manual,) = told(Manual())
        assert "no optimizer of self.optimizers() was stepped" in manual
        assert told(Half()) == told(Tiny()) == told(returning("on_train_batch_start", -1)) == []


@pytest.mark.parametrize("answer", [-1, np.int64(-1), torch.tensor(-1)], ids=lambda answer: type(answer).__name__)
def test_any_kind_of_minus_one_skips_the_epoch(answer, local_trainer, caplog):
    trainer = local_trainer(max_epochs=1)
    with caplog.at_level(logging.WARNING, "raytrainer"):
        trainer.fit(returning("on_train_batch_start", answer), data())
    assert trainer.global_step == 0 and "means nothing" not in caplog.text


def test_what_means_nothing_is_told_of_once(local_trainer, caplog):
    with caplog.at_level(logging.WARNING, "raytrainer"):
        local_trainer(max_epochs=2).fit(returning("on_train_batch_start", "skip"), data())
    assert caplog.text.count("on_train_batch_start returned 'skip', which means nothing: return -1") == 1


def test_so_it_is_where_the_answer_is_another_one_in_each_batch(local_trainer, caplog):
    class Counts(Tiny):
        def on_train_batch_start(self, batch, batch_idx):
            return batch_idx

    with caplog.at_level(logging.WARNING, "raytrainer"):
        local_trainer(max_epochs=2).fit(Counts(), data())
    assert caplog.text.count("on_train_batch_start returned 0, which means nothing") == 1
    assert caplog.text.count("means nothing") == 1


@pytest.mark.parametrize(
    ("owner", "hook", "taken", "given"),
    [
        ("module", "on_train_epoch_end", lambda self, outputs: None, r"on_train_epoch_end\(\)"),
        ("module", "setup", lambda self: None, r"setup\(stage\)"),
        ("module", "on_validation_batch_end", lambda self: None, r"on_validation_batch_end\(outputs, batch, batch_idx"),
        ("module", "on_train_batch_start", lambda self, batch, i, j: None, r"on_train_batch_start\(batch, batch_idx\)"),
        ("datamodule", "setup", lambda self: None, r"setup\(stage\)"),
        ("module", "configure_gradient_clipping", lambda self, optimizer: None, r"configure_gradient_clipping\(opt"),
        ("callback", "on_train_epoch_end", lambda self: None, r"on_train_epoch_end\(trainer, module\)"),
        ("worker callback", "on_train_batch_end", lambda self, trainer, module: None, r"on_train_batch_end\(trainer"),
    ],
)  # fmt: skip
def test_hooks_that_take_something_else(local_trainer, owner, hook, taken, given):
    kinds = {"module": Tiny, "datamodule": rt.DataModule, "callback": rt.Callback, "worker callback": rt.WorkerCallback}
    made = type("Odd", (kinds[owner],), {hook: taken})()
    trainer = local_trainer(max_epochs=1, callbacks=[made] if "callback" in owner else None)
    with pytest.raises(ConfigurationError, match=rf"Odd.{hook}\(.*\): it is called as {given}"):
        trainer.fit(made if owner == "module" else Tiny(), data(), datamodule=made if owner == "datamodule" else None)


def yields(self, *args):
    yield 1


async def waits(self, *args):
    pass


@pytest.mark.parametrize(
    ("kind", "hook", "value", "message"),
    [
        (Tiny, "validation_step", yields, "has a yield in it, so that calling it would run nothing"),
        (Tiny, "training_step", waits, "is an async def"),
        (rt.Callback, "on_fit_start", yields, "has a yield in it"),
        (rt.WorkerCallback, "on_train_start", waits, "is an async def"),
        (rt.DataModule, "setup", yields, "has a yield in it"),
        (rt.DataModule, "train_dataloader", data(), r"is a DataLoader: it is a method, def train_dataloader\(self"),
        (Tiny, "val_dataloader", [data()], "is a list: it is a method"),
        (Tiny, "optimizer_step", 3, "is an int: it is a method"),
    ],
)
def test_hooks_that_would_not_run(local_trainer, kind, hook, value, message):
    odd = type("Odd", (kind,), {hook: value})()
    trainer = local_trainer(max_epochs=1, callbacks=[odd] if isinstance(odd, rt.Callback | rt.WorkerCallback) else None)
    with pytest.raises(ConfigurationError, match=rf"Odd\.{hook} {message}"):
        trainer.fit(odd if kind is Tiny else Tiny(), data(), datamodule=odd if kind is rt.DataModule else None)


def test_datasets_in_attributes_are_ones_own(local_trainer):
    class Fine(rt.DataModule):
        def setup(self, stage):
            self.val_dataset = self.train_dataset

        def train_dataloader(self):
            return DataLoader(self.train_dataset, 4)

    fine = Fine()
    fine.train_dataset = data().dataset
    for _ in range(2):  # the second time with what `setup` has set
        trainer = local_trainer(max_epochs=1)
        trainer.fit(Tiny(), datamodule=fine)
        assert trainer.global_step > 0


def test_a_loader_hook_may_yield_batches(local_trainer):
    class Fine(Tiny):
        def train_dataloader(self):
            yield from data()

    trainer = local_trainer(max_epochs=1)
    trainer.fit(Fine())
    assert trainer.global_step == len(data())


def test_hooks_that_take_more_or_less_than_they_need(local_trainer):
    class Fine(Tiny):
        def setup(self, stage=None): ...
        def on_train_batch_start(self, batch, batch_idx, unused=0): ...
        def on_validation_batch_start(self, batch, batch_idx): ...
        def on_train_epoch_end(self, *args, **kwargs): ...
        def on_validation_batch_end(self, outputs, batch, batch_idx, *, dataloader_idx=0): ...

    local_trainer(max_epochs=1).fit(Fine(), data(), data())


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint"])
def test_a_metric_that_nothing_logs(local_trainer, name, tmp_path):
    saves = name == "ModelCheckpoint"
    callback = rt.ModelCheckpoint(tmp_path, monitor="val_los") if saves else rt.EarlyStopping("val_los")

    class Logs(Tiny):
        def training_step(self, batch, batch_idx):
            self.log("loss", 1.0, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

    with pytest.raises(ConfigurationError, match=rf"{name}\(monitor='val_los'\): .*Nothing is validated \(there is no"):
        local_trainer(max_epochs=1, callbacks=[callback]).fit(Logs(), data())
    with pytest.raises(ConfigurationError, match=r"there are: .*val_loss. Did you mean 'val_loss'\? Call self.log"):
        local_trainer(max_epochs=1, callbacks=[callback]).fit(Logs(), data(), data())


def test_what_a_file_is_that_is_no_checkpoint(local_trainer, tmp_path):
    weights, module, text = (tmp_path / name for name in ("weights.pt", "module.pt", "text.ckpt"))
    torch.save(Tiny().state_dict(), weights)
    torch.save(torch.nn.Linear(1, 1), module)
    text.write_text("x")
    messages = {
        weights: r"holds tensors by name.*load_state_dict\(torch.load\(path\)\)",
        module: r"it holds torch.nn.modules.linear.Linear. If you trust the file",
        text: r"nor a file of Lightning's: torch cannot read it",
    }
    for path, message in messages.items():
        with pytest.raises(CheckpointError, match=message):
            local_trainer(max_epochs=1).fit(Tiny(), data(), ckpt_path=path)
    with pytest.raises(ConfigurationError, match="ckpt_path=3: give a path"):
        local_trainer(max_epochs=1).fit(Tiny(), data(), ckpt_path=3)
