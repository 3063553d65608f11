"""The command line, and Trainers from plain values."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
import torch
import yaml
from tiny import Tiny, data

import raytrainer as rt
from raytrainer import ConfigurationError, DataModule, Trainer

pytest.importorskip("jsonargparse")

from raytrainer.cli import main


class Model(Tiny):
    """A linear model.

    Args:
        lr: How fast it learns.
        untyped: Anything.
    """

    def __init__(self, lr: float = 0.1, untyped="x"):
        super().__init__(lr)
        self.save_hyperparameters()
        self.initial = self.layer.weight.detach().clone()

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


class Pairs(DataModule):
    def __init__(self, samples: int = 8) -> None:
        super().__init__()
        self.samples = samples

    def train_dataloader(self):
        return data(self.samples)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Spy(rt.Callback):
    """Remembers whom it saw."""

    seen: list = []  # noqa: RUF012

    def __init__(self, name: str = "spy") -> None:
        self.name = name

    def setup(self, trainer, module, stage):
        Spy.seen.append((self.name, stage, trainer, module))


@pytest.fixture
def config(tmp_path):
    """A file, and what is in it."""
    Spy.seen = []
    content = {
        "seed_everything": 7,
        "model": {"class_path": "test_cli.Model", "init_args": {"lr": 0.25}},
        "data": {"class_path": "test_cli.Pairs"},
        "trainer": {
            "strategy": "local", "max_epochs": 5, "enable_progress_bar": False, "enable_model_summary": False,
            "default_root_dir": str(tmp_path), "callbacks": [{"class_path": "test_cli.Spy"}],
            "logger": {"class_path": "raytrainer.CSVLogger", "init_args": {"save_dir": str(tmp_path / "out")}},
        },
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_fit_with_overrides(config, tmp_path):
    main(["fit", "--config", config, "--trainer.max_epochs=2", "--data.samples=6", "--model.untyped=y"])
    ((name, stage, trainer, module),) = Spy.seen
    assert (name, stage, trainer.current_epoch, trainer.global_step) == ("spy", "fit", 2, 6)
    assert (module.lr, module.hparams.untyped) == (0.25, "y")
    assert isinstance(trainer.logger, rt.CSVLogger) and trainer.log_dir == f"{tmp_path}/out/logs/version_0"
    assert json.loads((tmp_path / "out/logs/version_0/hparams.json").read_text())["lr"] == 0.25
    # the seed came before the weights
    torch.manual_seed(7)
    assert torch.equal(module.initial, torch.nn.Linear(4, 2).weight)
    assert trainer.settings.seed == 7


def test_later_files_win(config, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("trainer: {max_epochs: 1}")
    main(["fit", "--config", config, "--config", str(other)])
    assert Spy.seen[0][2].current_epoch == 1


def test_resuming(config):
    main(["fit", "--config", config, "--trainer.max_epochs=1"])
    main(["fit", "--config", config, "--trainer.max_epochs=3", "--ckpt_path=last"])
    assert Spy.seen[1][2].ckpt_path is not None and Spy.seen[1][2].global_step == 12


def test_evaluation(config, tmp_path, capsys):
    (validated,) = main(["validate", "--config", config])
    (tested,) = main(["test", "--config", config])
    assert validated["val_loss"] == tested["test_loss"] > 0
    assert "val_loss" in capsys.readouterr().out
    predictions = main(["predict", "--config", config, f"--output={tmp_path}/p.pt"])
    saved = torch.load(tmp_path / "p.pt")
    assert torch.equal(torch.cat(saved), torch.cat(predictions)) and len(saved) == 4


def test_print_config_is_a_config(config, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", config, "--trainer.max_epochs=2", "--trainer.profiler=simple", "--print_config"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    printed = yaml.safe_load(text)
    assert printed["trainer"]["max_epochs"] == 2 and printed["model"]["init_args"] == {"lr": 0.25, "untyped": "x"}
    assert printed["trainer"]["callbacks"] == [{"class_path": "test_cli.Spy", "init_args": {"name": "spy"}}]
    again = tmp_path / "again.yaml"
    again.write_text(text)
    main(["fit", "--config", str(again)])
    assert Spy.seen[0][2].current_epoch == 2 and Spy.seen[0][2].profiler.files


def test_help_reads_well(capsys):
    for words, shown in [
        (["--help"], ["Train a model.", "Predict every batch.", "example of a file for --config"]),
        (["fit", "--help"], ["--trainer.max_epochs", "Epochs at most", "the Trainer:", "--model", "--ckpt_path"]),
        (["fit", "--model.help=test_cli.Model"], ["--model.lr", "How fast it learns"]),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(words)
        text = capsys.readouterr().out
        assert ended.value.code == 0 and all(part in text for part in shown), text
    # every argument of the Trainer is explained
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    lines = capsys.readouterr().out.split("  --trainer.")
    assert not [part for part in lines[1:] if len(part.split("(type:")[0].split()) < 4 and ".help" not in part]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit"], "model"),
        (["fly"], "fly"),
        (["fit", "--trainer.epochs=3"], "epochs"),
        (["fit", "--trainer.max_epochs=many"], "max_epochs"),
        (["fit", "--trainer.limit_val_batches=1.5"], "limit_val_batches=1.5"),
        (["fit", "--trainer.max_epoch=1"], "--trainer.max_epoch: Trainer has no argument 'max_epoch': did you mean"),
        (["fit", "--trainer.accelerator", "cpu"], "Trainer has no argument 'accelerator'. Here: leave it out"),
        (["fit", "--trainr.max_epochs=1"], "--trainr.max_epochs: there is no 'trainr'; did you mean 'trainer'?"),
        (["fit", "--modle.lr", "1"], "--modle.lr: there is no 'modle'; did you mean 'model'?"),
        (["fit", "--max_epochs=1"], "--max_epochs: did you mean --trainer.max_epochs?"),
        (["fit", "--lr=1"], "--lr: no such option. There are --config, --model"),
        (["fit", "--model.lrr=1"], "--model.lrr: test_cli.Model has no argument 'lrr': did you mean 'lr'?"),
        (
            ["fit", "--data.sampels=1"],
            "--data.sampels: test_cli.Pairs has no argument 'sampels': did you mean 'samples'",
        ),
        (["fit", "--model=test_cli.Nothing"], "--model=test_cli.Nothing: module 'test_cli' has no attribute 'Nothing'"),
        (
            ["fit", "--model=test_cli.Pairs"],
            "--model=test_cli.Pairs: give the path of a class that derives from raytrainer.Module",
        ),
    ],
)
def test_errors_end_with_a_message(words, message, config, capsys):
    if len(words) > 1:
        words = [words[0], "--config", config, *words[1:]]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_as_a_program(monkeypatch, capsys):
    """`python -m`, in this process; in one of its own: see test_doctor."""
    monkeypatch.setattr(sys, "argv", ["-m", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("raytrainer", run_name="__main__", alter_sys=True)
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("usage: python -m raytrainer {fit,validate,test,predict}")


def test_without_jsonargparse(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match=r"error: the command line needs jsonargparse, .* extra 'cli'"):
        main(["--help"])


# ---------------------------------------------------------------- Trainer.from_config


def test_from_config(tmp_path):
    config = {
        "max_epochs": 3,
        "strategy": {"class_path": "DDP", "init_args": {"find_unused_parameters": True}},
        "num_processes": 2,
        "callbacks": [
            {"class_path": "test_cli.Spy", "init_args": {"name": "x"}},
            {"class_path": "LearningRateMonitor"},
        ],
        "logger": [{"class_path": "raytrainer.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}],
        "limit_train_batches": 0.5,
        "compile": {"mode": "default"},
    }
    before = json.dumps(config)
    trainer = Trainer.from_config(config)
    assert json.dumps(config) == before
    assert trainer.max_epochs == 3 and trainer.settings.ddp.find_unused_parameters
    assert {"Spy", "LearningRateMonitor"} <= {type(callback).__name__ for callback in trainer.callbacks}
    assert isinstance(trainer.loggers[0], rt.CSVLogger) and trainer.settings.limit_train_batches == 0.5
    assert trainer.settings.compile == {"mode": "default"}

    class Mine(Trainer):
        pass

    assert type(Mine.from_config({})) is Mine


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_epoch": 3}, "Trainer has no argument 'max_epoch': did you mean 'max_epochs'"),
        ({"callbacks": [{"class_path": "nowhere.Thing"}]}, r"class_path='nowhere.Thing'.*nowhere"),
        ({"callbacks": [{"class_path": "raytrainer.Thing"}]}, "Thing"),
        ({"callbacks": [{"class_path": "raytrainer.EarlyStopping", "init_args": {"monitr": "x"}}]}, "'monitor'"),
        ({"callbacks": [{"class_path": "raytrainer.EarlyStopping", "monitor": "x"}]}, "init_args"),
        ({"callbacks": [{"class_path": 3}]}, "class_path=3"),
        ({"callbacks": [{"class_path": "raytrainer.__version__"}]}, "is a str"),
        ({"max_epochs": -3}, "max_epochs"),
    ],
)
def test_wrong_configs(config, message):
    with pytest.raises(ConfigurationError, match=message):
        Trainer.from_config(config)
