"""What profilers show of a run, and that they leave no trace in one."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from tiny import Tiny, data, weights

from raytrainer import AdvancedProfiler, ConfigurationError, PyTorchProfiler, SimpleProfiler


class Busy(Tiny):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) + self.recognisable()

    def recognisable(self):
        return self.layer.weight.sum() * 0.0

    def on_before_optimizer_step(self, optimizer):
        pass

    def test_step(self, batch, batch_idx):
        self.recognisable()


@pytest.fixture
def said(caplog):
    root = logging.getLogger("raytrainer")
    root.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "raytrainer"):
        yield caplog
    root.removeHandler(caplog.handler)


def fitted(make, profiler, **options):
    trainer = make(max_epochs=2, profiler=profiler, **options)
    module = Busy()
    trainer.fit(module, data(), data(4))
    return trainer, module


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}


def test_simple(local_trainer, tmp_path, said):
    trainer, _ = fitted(local_trainer, "simple")
    assert trainer.profiler.files == [f"{tmp_path}/profile/rank0.txt"]
    text = Path(trainer.profiler.files[0]).read_text()
    found = rows(text)
    calls = {name: int(cells[0]) for name, cells in found.items() if name != "whole"}
    assert calls["training_step"] == calls["on_before_optimizer_step"] == calls["optimizer_step"] == 20
    assert calls["backward"] == 20 and calls["validation_step"] == 6  # with the sanity check's
    assert calls["next_batch"] == 20 and calls["on_train_epoch_end"] == 2
    _, mean, total, share = found["training_step"]
    assert float(total) == pytest.approx(20 * float(mean) / 1e3, abs=2e-3)
    whole = float(found["whole"][1])
    assert float(share.rstrip("%")) == pytest.approx(100 * float(total) / whole, abs=100 * 2e-3 / whole)
    assert text in said.text


def test_each_run_has_its_own_figures(local_trainer, tmp_path):
    trainer, module = fitted(local_trainer, SimpleProfiler())
    trainer.fit(module, data())
    assert rows(Path(trainer.profiler.files[0]).read_text())["training_step"][0] == "20"
    trainer.test(module, data(4), verbose=False)
    assert trainer.profiler.files == [f"{tmp_path}/profile_test/rank0.txt"]
    found = rows(Path(trainer.profiler.files[0]).read_text())
    assert found["test_step"][0] == "2" and "training_step" not in found


def test_nothing_is_written_over(local_trainer, tmp_path, monkeypatch):
    """Neither what an earlier run or somebody else has, nor what another driver writes at the same moment."""
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "rank0.txt").write_text("mine")
    (tmp_path / "profile-v1").write_text("a file")
    make = os.mkdir

    def made(path, *args):
        make(path, *args)
        if str(path).endswith("profile-v2"):  # the other driver is faster
            raise FileExistsError(path)

    monkeypatch.setattr(os, "mkdir", made)
    files = [fitted(local_trainer, "simple")[0].profiler.files for _ in range(2)]
    assert files == [[f"{tmp_path}/profile-v3/rank0.txt"], [f"{tmp_path}/profile-v4/rank0.txt"]]
    assert (tmp_path / "profile" / "rank0.txt").read_text() == "mine"
    assert (tmp_path / "profile-v1").read_text() == "a file" and not list((tmp_path / "profile-v2").iterdir())


def test_advanced(local_trainer, said):
    trainer, _ = fitted(local_trainer, "advanced")
    text = Path(trainer.profiler.files[0]).read_text()
    whole, _ = fitted(local_trainer, AdvancedProfiler(lines=10**6))  # how long it takes is no matter
    lines = Path(whole.profiler.files[0]).read_text().splitlines()
    (line,) = [line for line in lines if "(recognisable)" in line]
    assert line.split()[0] == "20"
    assert "rank 0:" in said.text
    short, _ = fitted(local_trainer, AdvancedProfiler(lines=1))
    assert len(Path(short.profiler.files[0]).read_text().splitlines()) < 15 < len(text.splitlines())


def test_pytorch(local_trainer):
    trainer, _ = fitted(local_trainer, "pytorch")
    assert trainer.profiler.files[0].endswith("/profile/rank0.json")
    events = json.loads(Path(trainer.profiler.files[0]).read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert names.count("raytrainer/training_step") == names.count("raytrainer/backward") == 3
    assert names.count("raytrainer/next_batch") == 3 and "aten::mse_loss" in names


def test_pytorch_in_an_evaluation_and_with_a_schedule(local_trainer):
    trainer = local_trainer(profiler=PyTorchProfiler(wait=0, warmup=0, active=2, record_shapes=True))
    trainer.test(Busy(), data(10), verbose=False)
    events = json.loads(Path(trainer.profiler.files[0]).read_text())["traceEvents"]
    assert [event.get("name") for event in events].count("raytrainer/test_step") == 2


def test_a_run_too_short_says_so(local_trainer, said):
    trainer = local_trainer(max_steps=1, profiler="pytorch")
    trainer.fit(Busy(), data())
    assert trainer.profiler.files == [] and "over too soon" in said.text


@pytest.mark.parametrize("profiler", ["simple", "advanced", "pytorch"])
def test_a_profiler_changes_nothing_and_survives_an_error(profiler, local_trainer):
    modules = []
    for chosen in (None, profiler):
        torch.manual_seed(4)
        trainer, module = fitted(local_trainer, chosen)
        modules.append(module)
    assert torch.equal(weights(modules[0]), weights(modules[1])) and modules[0].events == modules[1].events
    assert type(pickle.loads(pickle.dumps(trainer.profiler))) is type(trainer.profiler)

    class Failing(Busy):
        def on_train_epoch_end(self):
            raise LookupError

    with pytest.raises(LookupError):
        trainer.fit(Failing(), data())
    trainer.fit(Busy(), data())
    assert len(trainer.profiler.files) == 1


@pytest.mark.parametrize(
    "make", [lambda: PyTorchProfiler(active=0), lambda: PyTorchProfiler(wait=-1), lambda: AdvancedProfiler(lines=0)]
)
def test_wrong_arguments(make, local_trainer):
    with pytest.raises(ConfigurationError):
        make()
    with pytest.raises(ConfigurationError, match=r"'quick'.*'simple', 'advanced', 'pytorch'"):
        local_trainer(profiler="quick")
