"""Checkpoints: going on gives the weights of an uninterrupted run; what is no checkpoint is refused."""

from __future__ import annotations

import json
import os
import pickle
import random

import pytest
import torch
from forge import forge, forge_meta
from tiny import Tiny, data, weights

from raytrainer import Callback, CheckpointError, ConfigurationError, DataModule, ModelCheckpoint, WorkerCallback
from raytrainer.checkpointing.checkpoint_format import read_checkpoint, write_checkpoint
from raytrainer.checkpointing.places import checkpoint_exists, remove_checkpoint

# ---------------------------------------------------------------- going on


class Stateful(Tiny):
    """Everything that a resumed run must put back: momentum, schedulers, dropout, augmentation, buffers."""

    def __init__(self, scheduler="step"):
        super().__init__()
        self.scheduler = scheduler
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return self.layer(torch.nn.functional.dropout(self.norm(x), training=self.training))

    def training_step(self, batch, batch_idx):
        self.seen += 1
        loss = super().training_step((batch[0] + random.random(), batch[1]), batch_idx)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        lr = torch.optim.lr_scheduler

        def plateau():
            return lr.ReduceLROnPlateau(optimizer, patience=0, threshold=9)

        made = {
            "step": lambda: {"scheduler": lr.OneCycleLR(optimizer, 0.1, total_steps=100), "interval": "step"},
            "epoch": lambda: lr.MultiStepLR(optimizer, [1, 2]),
            "lambda": lambda: lr.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
            "sequence": lambda: lr.SequentialLR(
                optimizer, [lr.ConstantLR(optimizer), lr.CosineAnnealingLR(optimizer, 9)], [1]
            ),
            "plateau": lambda: {"scheduler": plateau(), "monitor": "val_loss"},
            "train plateau": lambda: {"scheduler": plateau(), "monitor": "train_loss"},
        }[self.scheduler]()  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": made}


SCHEDULERS = ["step", "epoch", "lambda", "sequence", "plateau", "train plateau"]


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("moment", ["train epoch", "validation"])
def test_resumed_weights_are_bit_equal(scheduler, moment, local_trainer, tmp_path):
    def fit(epochs, ckpt_path=None, **options):
        torch.manual_seed(1)
        module = Stateful(scheduler)
        saving = ModelCheckpoint(dirpath=tmp_path / "c", save_top_k=-1, save_on_train_epoch_end=moment == "train epoch")
        trainer = local_trainer(max_epochs=epochs, seed=4, callbacks=saving, **options)
        trainer.fit(module, data(shuffle=True), data(6), ckpt_path=ckpt_path)
        return module, trainer, saving

    whole, whole_trainer, _ = fit(3)
    paths = sorted((tmp_path / "c").iterdir(), key=lambda p: read_checkpoint(p)["global_step"])
    assert len(paths) == 3
    for done, path in enumerate(paths[:2], start=1):
        resumed, trainer, _ = fit(3, path)
        assert same(state(resumed), state(whole)), path
        assert (trainer.global_step, trainer.current_epoch) == (30, 3)
        # nothing is done twice, or left out
        assert resumed.events.count("t") == 10 * (3 - done)
        assert resumed.events.count("s") == 0
        assert trainer.callback_metrics["train_loss"] == whole_trainer.callback_metrics["train_loss"]
    finished, trainer, _ = fit(3, paths[2])
    assert same(state(finished), state(whole)) and finished.events.count("t") == 0
    assert trainer.current_epoch == 3


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 4}, {"accumulate_grad_batches": 2}], ids=str)
def test_resumed_in_the_middle_of_an_epoch(options, local_trainer, tmp_path):
    def fit(ckpt_path=None, **more):
        torch.manual_seed(1)
        module = Stateful()
        trainer = local_trainer(max_epochs=2, seed=4, **options, **more)
        trainer.fit(module, data(shuffle=True), data(6), ckpt_path=ckpt_path)
        return module, trainer

    whole, _ = fit()
    saving = ModelCheckpoint(dirpath=tmp_path / "c", every_n_train_steps=2, save_top_k=-1)
    fit(callbacks=saving)
    events = [event for event in whole.events if event != "s"]
    after = [index for index, event in enumerate(events, start=1) if event == "t"]
    paths = sorted((tmp_path / "c").iterdir())
    assert len(paths) >= 5
    for path in paths:
        resumed, _ = fit(path)
        assert same(state(resumed), state(whole)), path
        # what follows the last batch before the save, and the validation and the epoch's end that came with it
        done = after[read_checkpoint(path)["progress"]["total_batches"] - 1]
        while events[done : done + 1] in (["v"], ["|"]):
            done += 1
        assert resumed.events == events[done:], path


def test_callbacks_and_user_state_travel(local_trainer, tmp_path):
    class Counting(Callback):
        count = 0

        def on_train_epoch_end(self, trainer, module):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state_dict):
            self.count = state_dict["count"]

        def on_save_checkpoint(self, trainer, module, checkpoint):
            checkpoint["mine"] = [1, 2]

        def on_load_checkpoint(self, trainer, module, checkpoint):
            assert checkpoint["mine"] == [1, 2]

    class Beside(WorkerCallback):
        def __init__(self):
            self.batches = 0

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.batches += 1

        def state_dict(self):
            return {"batches": torch.tensor(self.batches)}

        def load_state_dict(self, state_dict):
            self.batches = int(state_dict["batches"])

    class Saving(Tiny):
        secret = None

        def on_save_checkpoint(self, checkpoint):
            checkpoint["secret"] = {"x": 7}

        def on_load_checkpoint(self, checkpoint):
            self.secret = checkpoint["secret"]

    class Data(DataModule):
        position = 0

        def train_dataloader(self):
            self.position += 1
            return data()

        def state_dict(self):
            return {"position": self.position}

        def load_state_dict(self, state_dict):
            self.position = 10 * state_dict["position"]

    def callbacks():
        return [Counting(), Beside(), ModelCheckpoint(dirpath=tmp_path / "c")]

    first = local_trainer(max_epochs=2, callbacks=callbacks())
    first.fit(Saving(), datamodule=Data())
    path = first.checkpoint_callback.best_model_path
    second = local_trainer(max_epochs=3, callbacks=callbacks())
    module, dm = Saving(), Data()
    second.fit(module, datamodule=dm, ckpt_path=path)
    counting, beside = second.callbacks[:2]
    # the first trainer's checkpoint was made after the second epoch
    assert counting.count == 3 and beside.batches == 30
    assert module.secret == {"x": 7} and dm.position >= 10
    assert second.ckpt_path == path


def test_named_checkpoints(local_trainer, tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path / "c", monitor="val_loss", save_last=True)
    trainer = local_trainer(max_epochs=2, callbacks=saving)
    module = Tiny()
    trainer.fit(module, data(), data(6))
    results = trainer.validate(module, data(6), ckpt_path="best", verbose=False)
    assert results[0]["val_loss"] == pytest.approx(float(saving.best_model_score))
    assert saving.last_model_path.endswith("last.ckpt") and checkpoint_exists(saving.last_model_path)
    with pytest.raises(CheckpointError, match=r'ckpt_path="best": no ModelCheckpoint'):
        local_trainer().validate(Tiny(), data(4), ckpt_path="best")


def test_weights_of_a_checkpoint_for_evaluation(local_trainer, tmp_path):
    module, trainer = Tiny(), local_trainer(max_epochs=1)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    expected = trainer.test(module, data(4), verbose=False)
    assert trainer.test(Tiny(), data(4), ckpt_path=tmp_path / "x.ckpt", verbose=False) == expected


def test_saving_in_a_callback_at_any_moment(local_trainer, tmp_path):
    class Saving(Callback):
        def save(self, trainer, name):
            trainer.save_checkpoint(tmp_path / name)

        def on_train_start(self, trainer, module):
            self.save(trainer, "start")

        def on_validation_end(self, trainer, module):
            self.save(trainer, "validation")

        def on_train_end(self, trainer, module):
            self.save(trainer, "end")

    local_trainer(max_epochs=1, callbacks=Saving(), num_sanity_val_steps=0).fit(Tiny(), data(), data(4))
    assert [read_checkpoint(tmp_path / name)["global_step"] for name in ("start", "validation", "end")] == [0, 10, 10]


@pytest.mark.parametrize(
    ("before", "now"), [(torch.optim.SGD, torch.optim.Adam), (torch.optim.Adam, torch.optim.RMSprop)]
)
def test_another_optimizers_state_is_refused(before, now, tmp_path, local_trainer):
    def fit(kind, epochs, **given):
        module = type("Changed", (Tiny,), {"configure_optimizers": lambda self: kind(self.parameters(), 0.1)})()
        trainer = local_trainer(max_epochs=epochs)
        trainer.fit(module, data(), **given)
        return trainer

    fit(before, 1).save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(
        CheckpointError, match=f"optimizer is another one: it has no .*, which this {now.__name__} needs"
    ):
        fit(now, 2, ckpt_path=tmp_path / "one.ckpt")
    assert fit(before, 2, ckpt_path=tmp_path / "one.ckpt").current_epoch == 2


# ---------------------------------------------------------------- load_from_checkpoint


class Sized(Tiny):
    def __init__(self, width, lr=0.1, *, bias=True, activation=None):
        super().__init__(lr)
        self.save_hyperparameters(ignore=["activation"])
        self.extra = torch.nn.Linear(4, width, bias=bias)


@pytest.fixture
def sized(local_trainer, tmp_path):
    module, trainer = Sized(3, bias=False), local_trainer(max_epochs=1)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "sized.ckpt")
    return module, tmp_path / "sized.ckpt"


def test_load_from_checkpoint(sized):
    module, path = sized
    loaded = Sized.load_from_checkpoint(path)
    assert same(state(loaded), state(module))
    assert loaded.hparams == {"width": 3, "lr": 0.1, "bias": False}
    assert Sized.load_from_checkpoint(str(path), lr=0.5).lr == 0.5
    assert Sized.load_from_checkpoint(path, map_location=torch.device("cpu")).device.type == "cpu"


def test_load_from_checkpoint_refuses(sized, tmp_path, local_trainer):
    _, path = sized
    with pytest.raises(CheckpointError, match=r"(?s)do not fit Sized.*size mismatch.*Construct the module as it was"):
        Sized.load_from_checkpoint(path, width=9)
    with pytest.raises(CheckpointError, match=r"(?s)do not fit Tiny.*extra\.weight"):
        Tiny.load_from_checkpoint(path)
    assert isinstance(Tiny.load_from_checkpoint(path, strict=False), Tiny)
    trainer = local_trainer(max_epochs=1)
    trainer.fit(Tiny(), data())
    trainer.save_checkpoint(tmp_path / "tiny.ckpt")
    with pytest.raises(ConfigurationError, match=r"Sized needs \['width'\].*save_hyperparameters"):
        Sized.load_from_checkpoint(tmp_path / "tiny.ckpt")


def test_unusual_hyperparameters(local_trainer, tmp_path, caplog):
    numpy = pytest.importorskip("numpy")
    from pathlib import Path

    class Odd(Tiny):
        def __init__(self, **options):
            super().__init__()
            self.save_hyperparameters()

    options = {"f": numpy.float64(0.5), "i": numpy.int64(3), "b": numpy.bool_(True), "p": Path("/x"),
               "n": None, "l": [1, (2.0, "s")], "a": numpy.arange(3), "fn": len}  # fmt: skip
    module, trainer = Odd(**options), local_trainer(max_epochs=1)
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "odd.ckpt")
    saved = read_checkpoint(tmp_path / "odd.ckpt")["hyper_parameters"]
    assert saved.pop("a").tolist() == [0, 1, 2]
    options.pop("a")
    assert saved == options and list(map(type, saved.values())) == list(map(type, options.values()))


# ---------------------------------------------------------------- what is no checkpoint


def test_a_whole_checkpoint(tmp_path):
    path = tmp_path / "a" / "b.ckpt"
    content = {"epoch": 1, "global_step": 2, "state_dict": {"w": torch.ones(2)}, "more": {"x": [1, (2, None)], 3: b"y"}}
    write_checkpoint(path, content)
    assert checkpoint_exists(path)
    read = read_checkpoint(path)
    assert torch.equal(read.pop("state_dict")["w"], torch.ones(2))
    assert read == {name: value for name, value in content.items() if name != "state_dict"}
    write_checkpoint(path, {"epoch": 2})
    assert read_checkpoint(path) == {"epoch": 2} and len(list(path.iterdir())) == 2  # the old state is gone
    remove_checkpoint(path)
    assert not path.exists() and not checkpoint_exists(path)
    remove_checkpoint(path)


def damaged(tmp_path, how):
    path = tmp_path / "x.ckpt"
    write_checkpoint(path, {"epoch": 1, "state_dict": {"w": torch.ones(100)}})
    meta = json.loads((path / "meta.json").read_text())
    state_file, record = path / meta["state"], meta["files"][meta["state"]]

    match how:
        case "missing":
            return tmp_path / "nothing.ckpt"
        case "file":
            (tmp_path / "file.ckpt").write_bytes(b"PK")
            return tmp_path / "file.ckpt"
        case "directory":
            return tmp_path
        case "truncated":
            state_file.write_bytes(state_file.read_bytes()[:-100])
        case "flipped":
            state_file.write_bytes(b"\0" * state_file.stat().st_size)
        case "no state":
            state_file.unlink()
        case "no json":
            (path / "meta.json").write_text("{")
        case "binary json":
            (path / "meta.json").write_bytes(b"\xff\xfe\x00")
        case "list":
            (path / "meta.json").write_text("[]")
        case "foreign":
            forge_meta(path, format="something-else")
        case "newer":
            forge_meta(path, version=99)
        case "no version":
            forge_meta(path, version=None)
        case "no size":
            forge_meta(path, files={meta["state"]: {**record, "bytes": None}})
        case "no checksum":
            forge_meta(path, files={meta["state"]: {**record, "checksum": "0"}})
        case "not sealed":
            (path / "meta.json").write_text(json.dumps({**meta, "epoch": 3}))
        case "escaping":
            forge_meta(path, state="../../etc/passwd", files={"../../etc/passwd": record})
        case "dots":
            forge_meta(path, state="..", files={"..": record})
        case "unnamed":
            forge_meta(path, state="state-000000000000.pt")
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no checkpoint there"),
        ("file", "no checkpoint there"),
        ("directory", "no checkpoint there"),
        ("truncated", r"state-\w+\.pt: .* bytes instead of .*truncated; use another"),
        ("flipped", r"state-\w+\.pt: the file is damaged"),
        ("no state", "state file .* is missing"),
        ("no json", r"meta\.json is damaged"),
        ("binary json", r"meta\.json is damaged"),
        ("list", "not a checkpoint of raytrainer"),
        ("foreign", "not a checkpoint of raytrainer"),
        ("newer", r"version 99, this raytrainer reads up to 2.*Upgrade raytrainer"),
        ("no version", "not a checkpoint of raytrainer"),
        ("no size", "not a checkpoint of raytrainer"),
        ("no checksum", "not a checkpoint of raytrainer"),
        ("not sealed", r"meta\.json is damaged"),
        ("unnamed", "not a checkpoint of raytrainer"),
        ("escaping", "not a checkpoint of raytrainer"),
        ("dots", "not a checkpoint of raytrainer"),
    ],
)
def test_refused(how, message, tmp_path, local_trainer):
    path = damaged(tmp_path, how)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)
    trainer = local_trainer(max_epochs=1)
    with pytest.raises(CheckpointError, match=message):
        trainer.fit(Tiny(), data(), ckpt_path=path)
    trainer.fit(Tiny(), data())  # and the trainer is as good as before


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_nothing_is_executed(form, tmp_path):
    path, trap = tmp_path / "x.ckpt", tmp_path / "trap"
    write_checkpoint(path, {"epoch": 1})
    malicious = Malicious(str(trap))
    forge(path, {"state_dict": {}, "x": malicious} if form == "torch" else pickle.dumps(malicious, protocol=2))
    with pytest.raises(CheckpointError, match="never executed"):
        read_checkpoint(path)
    assert not trap.exists()


def test_what_is_no_plain_value_is_refused_when_saving(tmp_path):
    with pytest.raises(CheckpointError, match=r"entry mine\['x'\]\[1\] is a function: store numbers"):
        write_checkpoint(tmp_path / "x.ckpt", {"mine": {"x": [1, len.__class__ and (lambda: 0)]}})
    assert not checkpoint_exists(tmp_path / "x.ckpt")


def test_a_directory_that_is_no_checkpoint_is_never_deleted(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("x")
    remove_checkpoint(tmp_path / "data")
    assert (tmp_path / "data" / "precious").exists()


def test_checkpoints_that_do_not_fit(local_trainer, tmp_path):
    class Two(Tiny):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

        def training_step(self, batch, batch_idx):
            pass

    saving = ModelCheckpoint(dirpath=tmp_path / "c")
    local_trainer(max_epochs=1, callbacks=saving).fit(Tiny(), data())
    with pytest.raises(CheckpointError, match=r"has 1 optimizers.* gives 2"):
        local_trainer(max_epochs=2).fit(Two(), data(), ckpt_path=saving.best_model_path)
    weights_only = tmp_path / "w.ckpt"
    trainer = local_trainer(max_epochs=1)
    trainer.fit(Tiny(), data())
    trainer.save_checkpoint(weights_only, weights_only=True)
    with pytest.raises(CheckpointError, match=r"weights only.*Tiny\.load_from_checkpoint"):
        local_trainer(max_epochs=2).fit(Tiny(), data(), ckpt_path=weights_only)


def test_nothing_to_save_yet(local_trainer, tmp_path):
    with pytest.raises(CheckpointError, match="no module yet"):
        local_trainer().save_checkpoint(tmp_path / "x")
    assert weights(Tiny()).numel() == 10
