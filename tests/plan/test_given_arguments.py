"""What public classes and functions say to names that they do not have, and to values of other types."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import pytest
import tensorboardX  # noqa: F401  # sets environment variables, which no test may do
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

import raytrainer
from raytrainer.errors import ConfigurationError, UnknownArgumentError
from raytrainer.plan.given_arguments import answers

#: What else these need to be made at all.
NEEDED: dict[str, dict[str, Any]] = {
    "EarlyStopping": {"monitor": "val_loss"},
    "CSVLogger": {"save_dir": "logs"},
    "TensorBoardLogger": {"save_dir": "logs"},
    "StochasticWeightAveraging": {"swa_lrs": 0.1},
    "GradientAccumulationScheduler": {"scheduling": {0: 1}},
    "PredictionWriter": {"path": "predictions"},
    "OnExceptionCheckpoint": {"dirpath": "saved"},
}
#: Whose only arguments are those of the classes that users derive, or functions by the names of hooks.
WITHOUT = {"Callback", "WorkerCallback", "Logger", "Module", "DataModule", "Profiler", "LambdaCallback",
           "LambdaWorkerCallback", "CombinedLoader", "RayDataset"}  # fmt: skip


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in raytrainer.__all__:
        found = getattr(raytrainer, name)
        if callable(found) and not (isinstance(found, type) and issubclass(found, Exception)):
            yield name, found


class Strange:
    pass


class Unmade(raytrainer.EarlyStopping):
    def __init__(self) -> None:
        self.mine = 1


@pytest.mark.parametrize("name", [n for n, kind in public() if n not in WITHOUT and inspect.signature(kind).parameters])
def test_a_misspelt_name_is_answered_with_the_nearest(name):
    kind = getattr(raytrainer, name)
    named = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is not p.VAR_KEYWORD]
    misspelt = f"{named[0][:-1]}x{named[0][-1]}"
    with pytest.raises(UnknownArgumentError, match=f"^{name} has no argument '{misspelt}': did you mean '{named[0]}'?"):
        kind(**{misspelt: 1})


@pytest.mark.parametrize("name", [name for name, kind in public() if isinstance(kind, type) and name not in WITHOUT])
def test_a_value_of_another_type_is_named_and_what_is_allowed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = getattr(raytrainer, name)
    named = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is not p.VAR_KEYWORD]
    for argument in named:
        for value in (Strange(), [Strange()], complex(1, 2)):
            with pytest.raises(ConfigurationError) as caught:
                kind(**{**NEEDED.get(name, {}), argument: value})
            told = str(caught.value)
            assert re.search(r"\bgive |\ballowed are |must be ", told), told
            assert argument in told or f"{name}(" in told or (argument == "callbacks" and "callback " in told), told


def of_lightnings(name, base):
    """An object of a class that looks like one of Lightning's."""
    parent = type(base, (), {"__module__": "lightning.pytorch"})
    return type(name, (parent,), {"__module__": "lightning.pytorch"})()


def test_what_is_missing_is_told_with_its_meaning():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'monitor'") as caught:
        raytrainer.EarlyStopping()
    assert caught.value.__notes__ == ["monitor: Name of the metric in `trainer.callback_metrics`."]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: raytrainer.DDP(find_unused=True), "'find_unused': did you mean 'find_unused_parameters'"),
        (lambda: raytrainer.ModelCheckpoint(num_to_keep=2), "Here: save_top_k="),
        (lambda: raytrainer.EarlyStopping("x", 0.0, 3, False, "min", True, True, 0.5), "and was given 0.5"),
        (lambda: raytrainer.WandbLogger(offline=True), 'Here: mode="offline"'),
        (lambda: raytrainer.WandbLogger(projet="x"), "did you mean 'project'"),
        (lambda: raytrainer.LambdaCallback(on_fit_ends=print), "did you mean 'on_fit_end'"),
        (lambda: raytrainer.ModelCheckpoint(every_n_epochs="3"), "give an integer or None. every_n_"),
        (lambda: raytrainer.Trainer(default_root_dir=3), "default_root_dir=3: give a local folder"),
        (lambda: raytrainer.Trainer(default_root_dir="s3://b/x"), r"a local folder.*ModelCheckpoint\(dirpath="),
        (lambda: raytrainer.Trainer(fast_dev_run="yes"), "give True, False, or an integer of at least 0"),
        (lambda: raytrainer.Trainer(snapshot_every=object()), 'Or steps, an integer of at least 1; "auto"'),
        (lambda: raytrainer.Trainer(max_epochs="3"), "max_epochs='3': give an integer of at least 0"),
        (lambda: raytrainer.Trainer(ScalingConfig(num_workers=2)), r"is Ray Train's; here .*num_proc"),
        (lambda: raytrainer.Trainer(num_processes=ScalingConfig(num_workers=2)), "ScalingConfig is Ray Train's"),
        (lambda: raytrainer.Trainer(max_failures=FailureConfig(max_failures=2)), r"Trainer\(max_failures=...\)"),
        (lambda: raytrainer.Trainer(callbacks=[CheckpointConfig(num_to_keep=2)]), r"ModelCheckpoint\(save_top_k="),
        (lambda: raytrainer.Trainer(run_config=RunConfig(name="x")), "Here: default_root_dir="),
        (lambda: raytrainer.Trainer().fit(lambda config: None), "a function: what a training loop does with a batch"),
        (lambda: raytrainer.Trainer().fit(raytrainer.Module(), epochs=3), r"has no argument 'epochs'. Here: Trainer"),
        (lambda: raytrainer.Trainer().fit(raytrainer.Module(), train_dataloader=[]), "mean 'train_dataloaders'"),
        (lambda: raytrainer.Trainer().fit(raytrainer.Module(), {"train": [1], "val": [2]}), "all of it would be"),
        (lambda: raytrainer.Trainer().test(loader=[]), "test has no argument 'loader'. Here: dataloaders="),
        (lambda: raytrainer.seed_everything(sed=3), "did you mean 'seed'"),
        (lambda: raytrainer.Trainer(logger="tensorbord"), r"Did you mean raytrainer.TensorBoardLogger\("),
        (lambda: raytrainer.Trainer(logger=raytrainer.CSVLogger), r"a class: give an object, CSVLogger\("),
        (lambda: raytrainer.Trainer(profiler="simpel"), "Did you mean 'simple'"),
        (lambda: raytrainer.Trainer(profiler=raytrainer.SimpleProfiler), "a class: give an object"),
        (lambda: raytrainer.Trainer(precision="fp16"), 'Did you mean "16-mixed"'),
        (lambda: raytrainer.Trainer(precision=torch.bfloat16), 'Did you mean "bf16-mixed"'),
        (lambda: raytrainer.Trainer(strategy=of_lightnings("DDPStrategy", "Strategy")), "is Lightning's: here that is"),
        (lambda: raytrainer.Trainer(logger=of_lightnings("CSVLogger", "Logger")), "take raytrainer.CSVLogger"),
        (lambda: raytrainer.Trainer(logger=of_lightnings("Mine", "Logger")), "derive it from raytrainer.Logger"),
        (lambda: raytrainer.Trainer(strategy="ddp_sharded"), 'here that is strategy="fsdp"'),
        (lambda: raytrainer.Trainer().save_checkpoint("x", weights=True), "did you mean 'weights_only'"),
        (lambda: raytrainer.Trainer().plot(name="x"), "did you mean 'names'"),
        (lambda: raytrainer.ModelCheckpoint(filename="{epoch:q}"), "Unknown format code 'q'"),
        (lambda: raytrainer.LearningRateFinder(mode="log"), "give 'exponential' or 'linear'"),
        (lambda: raytrainer.Trainer(callbacks=Unmade()), r"Unmade.__init__ does not call super\(\).__init__"),
    ],
)  # fmt: skip
def test_answers(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_names_of_other_packages_are_answered():
    for name, here in {
        "ScalingConfig": "num_processes",
        "report": "self.log",
        "ModelCheckpont": "'ModelCheckpoint'",
    }.items():
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'.*{here}"):
            getattr(raytrainer, name)


def test_errors_of_others_come_with_what_to_do(local_trainer):
    class Reporting(raytrainer.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                return self.net(batch.double()).sum()
            raise RuntimeError("`report` cannot be used outside of a Ray Train training function.")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(RuntimeError, match="cannot be used outside") as caught:
        local_trainer(max_epochs=1).fit(Reporting(), [None, torch.ones(1, 1)])
    assert any("Here that is self.log" in note for note in caught.value.__notes__)
    with pytest.raises(RuntimeError, match="dtype") as caught:
        local_trainer(max_epochs=1).fit(Reporting(), [torch.ones(1, 1)])
    assert any("dtypes=torch.float32 of a RayDataset" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda self: self.log("a", 1.0, on_epochs=True), TypeError, "self.log has no .* did you mean 'on_epoch'"),
        (lambda self: os.environ["LOCAL_RANK"], KeyError, r"raytrainer.rank\(\)"),
        (lambda self: self.net_that_is_not.trainer, AttributeError, "net_that_is_not"),
        (lambda self: Strange().trainer, AttributeError, r"elsewhere there are raytrainer.rank\(\)"),
        (lambda self: self.log_dict([1.0]), raytrainer.MetricError, r"self.log_dict\(\[1.0\]\): give a dict"),
        (lambda self: self.log_dict({"a": 1.0}, prog_bra=True), TypeError, "self.log has no .* mean 'prog_bar'"),
    ],
)
def test_calls_in_a_step_are_answered(local_trainer, call, error, told):
    class Calling(raytrainer.Module):
        def training_step(self, batch, batch_idx):
            call(self)

        def configure_optimizers(self):
            return None

    with pytest.raises(error) as caught:
        local_trainer(max_epochs=1).fit(Calling(), [torch.ones(1, 1)])
    assert re.search(told, "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])]))


@answers
def taking(
    count: int | None = None,
    share: float = 0.0,
    names: str | Sequence[str] = (),
    path: str | os.PathLike[str] | None = None,
    mode: Literal["a", "b"] = "a",
    rates: Mapping[str, float] | None = None,
    after: Callable[[], None] | None = None,
    time: timedelta | None = None,
    flag: bool = False,
    unknown: NotThere = None,  # type: ignore[name-defined] # noqa: F821
) -> str:
    """Takes all kinds.

    Args:
        count: How many. Second sentence.
        share: How much.
    """
    return "taken"


@pytest.mark.parametrize(
    "given",
    [
        {"count": np.int64(3)}, {"count": torch.tensor(3)}, {"share": 1}, {"share": np.float32(1)},
        {"share": torch.tensor(0.5)}, {"names": "x"}, {"names": ["x", "y"]}, {"names": ("x",)}, {"path": "x"},
        {"flag": np.True_}, {"mode": "b"}, {"rates": {"x": 1}}, {"after": print}, {"time": timedelta(1)},
        {"unknown": object()},
    ],
)  # fmt: skip
def test_what_fits_is_taken(given):
    assert taking(**given) == "taken"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": "3"}, r"^taking\(count='3'\): give an integer or None\. count: How many\.$"),
        ({"count": True}, "give an integer or None"),
        ({"share": "1"}, r"give a number\. share: How much\."),
        ({"share": True}, "give a number"),
        ({"names": [1]}, "give a text or a list of texts"),
        ({"path": 3}, "give a text, a path or None"),
        ({"mode": "c"}, "give 'a' or 'b'"),
        ({"rates": {"x": "y"}}, "give a dict or None"),
        ({"after": 3}, "give a function or None"),
        ({"time": 3}, "give a timedelta or None"),
        ({"flag": 1}, "give True or False"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises(ConfigurationError, match=message):
        taking(**given)


def test_signatures_stay():
    assert list(inspect.signature(raytrainer.ModelCheckpoint).parameters)[:3] == ["dirpath", "filename", "monitor"]
    assert raytrainer.ModelCheckpoint.__init__.__name__ == "__init__"

    class Own(raytrainer.ModelCheckpoint):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)

    assert Own(save_top_k=-1).save_top_k == -1
    with pytest.raises(UnknownArgumentError, match="ModelCheckpoint has no argument 'save_topk'"):
        Own(save_topk=2)
