"""A Module and a DataModule that write down every hook that is called, and the order that is expected of them.

They record to a file, by rank 0 only, so that the same objects serve in process and in Ray workers of one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from raytrainer import DataModule, Module

STAGES = ("train", "val", "test", "predict")
BATCHES = 8  # of every loader: enough for `limit_*_batches=2` on two workers

DATA_HOOKS = [
    "prepare_data",
    "setup",
    "teardown",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
]
MODULE_HOOKS = [
    "configure_model",
    "configure_callbacks",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "backward",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "on_fit_start",
    "on_fit_end",
    "on_train_start",
    "on_train_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_validation_model_zero_grad",
    "on_validation_model_eval",
    "on_validation_model_train",
    "on_validation_start",
    "on_validation_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_test_model_eval",
    "on_test_model_train",
    "on_test_start",
    "on_test_end",
    "on_test_epoch_start",
    "on_test_epoch_end",
    "on_test_batch_start",
    "on_test_batch_end",
    "on_predict_model_eval",
    "on_predict_start",
    "on_predict_end",
    "on_predict_epoch_start",
    "on_predict_epoch_end",
    "on_predict_batch_start",
    "on_predict_batch_end",
]


def _loader() -> DataLoader[Any]:
    return DataLoader(torch.ones(2 * BATCHES, 4), batch_size=2)  # type: ignore[arg-type]


def _record(owner: type, names: Iterable[str], prefix: str = "") -> None:
    """Give `owner` a hook of each name that notes its call and then does what its base class does."""

    def make(name: str) -> Callable[..., Any]:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            stage = kwargs.get("stage", args[0] if args else None)
            # Lightning's stage is an enum whose value is ours
            self.note(
                f"{prefix}{name}({getattr(stage, 'value', stage)})" if name in ("setup", "teardown") else prefix + name
            )
            return getattr(super(owner, self), name)(*args, **kwargs)

        return hook

    for name in names:
        setattr(owner, name, make(name))


class Plain(Module):
    """Steps and loaders; each notes its call in the file `path`."""

    def __init__(self, path: str | Path, interval: str = "step") -> None:
        super().__init__()
        self.path, self.interval = str(path), interval
        self.layer = torch.nn.Linear(4, 1)

    def note(self, text: str) -> None:
        if self.global_rank == 0:
            with open(self.path, "a") as file:
                file.write(text + "\n")

    def training_step(self, batch, batch_idx):
        self.note("training_step")
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.note("validation_step")
        self.log("val", self.layer(batch).sum())

    def test_step(self, batch, batch_idx):
        self.note("test_step")

    def predict_step(self, batch, batch_idx):
        self.note("predict_step")
        return self.layer(batch)

    def configure_optimizers(self):
        self.note("configure_optimizers")
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def train_dataloader(self):
        self.note("train_dataloader")
        return _loader()

    def val_dataloader(self):
        self.note("val_dataloader")
        return _loader()

    def test_dataloader(self):
        self.note("test_dataloader")
        return _loader()

    def predict_dataloader(self):
        self.note("predict_dataloader")
        return _loader()


class RecordingModule(Plain):
    """Overrides every hook."""


_record(RecordingModule, [*MODULE_HOOKS, *DATA_HOOKS])


class PlainData(DataModule):
    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = str(path)

    def note(self, text: str) -> None:
        if self.trainer is None or self.trainer.global_rank == 0:
            with open(self.path, "a") as file:
                file.write(text + "\n")

    def train_dataloader(self):
        self.note("data.train_dataloader")
        return _loader()

    def val_dataloader(self):
        self.note("data.val_dataloader")
        return _loader()

    def test_dataloader(self):
        self.note("data.test_dataloader")
        return _loader()

    def predict_dataloader(self):
        self.note("data.predict_dataloader")
        return _loader()


class RecordingData(PlainData):
    """Overrides every hook; "data." stands before their names."""


_record(RecordingData, [*DATA_HOOKS, "state_dict", "load_state_dict"], "data.")


# ---------------------------------------------------------------- what is expected


@dataclass(frozen=True)
class Scenario:
    """One call of a Trainer: its options, and the hooks it must call."""

    verb: str
    expected: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    with_data: bool = False
    interval: str = "step"


def _transfer(data: str) -> list[str]:
    return [f"{data}on_before_batch_transfer", f"{data}transfer_batch_to_device", f"{data}on_after_batch_transfer"]


def _train_batch(data: str = "", zero: bool = True, step: bool = True, schedule: bool = True) -> list[str]:
    """A training batch: whether it zeroes gradients, whether it steps, whether a scheduler does."""
    return [
        *_transfer(data),
        "on_train_batch_start",
        *(["optimizer_step"] if step else []),
        "training_step",
        *(["on_before_zero_grad", "optimizer_zero_grad"] if zero else []),
        "on_before_backward",
        "backward",
        "on_after_backward",
        *(["on_before_optimizer_step", "configure_gradient_clipping"] if step else []),
        *(["lr_scheduler_step"] if schedule else []),
        "on_train_batch_end",
    ]


def _evaluation(name: str, step: str, batches: int, data: str = "") -> list[str]:
    batch = [*_transfer(data), f"on_{name}_batch_start", step, f"on_{name}_batch_end"]
    return [
        f"on_{name}_model_eval",
        f"on_{name}_start",
        f"on_{name}_epoch_start",
        *batch * batches,
        f"on_{name}_epoch_end",
        f"on_{name}_end",
        *([f"on_{name}_model_train"] if name != "predict" else []),
    ]


def _run(stage: str, body: list[str], data: bool = False, after: tuple[str, ...] = ()) -> list[str]:
    """What surrounds every run; `after` stands between `configure_model` and the rest."""

    def both(hook: str) -> list[str]:
        return [f"data.{hook}", hook] if data else [hook]

    return [
        "configure_callbacks",
        *both("prepare_data"),
        *both(f"setup({stage})"),
        "configure_model",
        *after,
        *body,
        *both(f"teardown({stage})"),
    ]


def _fit(body: list[str], data: bool = False) -> list[str]:
    start = [*body, "on_train_end", "on_fit_end"]
    return _run("fit", start, data, ("configure_optimizers", "on_fit_start"))


def _fit_with_sanity(data: str, interval: str) -> list[str]:
    """Two epochs of two batches, after a sanity check of one."""
    by_step = interval == "step"
    epoch = [
        "on_train_epoch_start",
        *_train_batch(data, schedule=by_step),
        *_train_batch(data),
        "on_validation_model_zero_grad",
        *_evaluation("validation", "validation_step", 2, data),
        "on_train_epoch_end",
    ]
    return _fit(
        [
            f"{data}val_dataloader",
            *_evaluation("validation", "validation_step", 1, data),
            f"{data}train_dataloader",
            "on_train_start",
            *epoch * 2,
        ],
        bool(data),
    )


_TWO = {"limit_train_batches": 2, "limit_val_batches": 2, "limit_test_batches": 2, "limit_predict_batches": 2}

SCENARIOS: dict[str, Scenario] = {
    f"fit{'_with_data' if data else ''}_{interval}": Scenario(
        "fit",
        _fit_with_sanity("data." if data else "", interval),
        {**_TWO, "max_epochs": 2, "num_sanity_val_steps": 1, "gradient_clip_val": 1.0},
        data,
        interval,
    )
    for data in (False, True)
    for interval in ("step", "epoch")
}
SCENARIOS["fit_accumulating"] = Scenario(
    "fit",
    _fit(
        [
            "train_dataloader",
            "val_dataloader",
            "on_train_start",
            "on_train_epoch_start",
            *_train_batch(step=False, schedule=False),
            *_evaluation("validation", "validation_step", 2),
            *_train_batch(zero=False),
            "on_validation_model_zero_grad",
            *_evaluation("validation", "validation_step", 2),
            "on_train_epoch_end",
        ]
    ),
    {
        **_TWO,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "accumulate_grad_batches": 2,
        "val_check_interval": 1,
    },
)
for _verb, _hook, _loader_stage in (
    ("validate", "validation", "val"),
    ("test", "test", "test"),
    ("predict", "predict", "predict"),
):
    for _data in ("", "data."):
        SCENARIOS[f"{_verb}{'_with_data' if _data else ''}"] = Scenario(
            _verb,
            _run(
                _verb,
                [f"{_data}{_loader_stage}_dataloader", *_evaluation(_hook, f"{_hook}_step", 2, _data)],
                bool(_data),
            ),
            dict(_TWO),
            bool(_data),
        )


def run_scenario(scenario: Scenario, path: Path, make_trainer: Callable[..., Any]) -> list[str]:
    """Run it with a trainer of `make_trainer(**options)`; return the hooks that were called."""
    module = RecordingModule(path, scenario.interval)
    data = RecordingData(path) if scenario.with_data else None
    trainer = make_trainer(**scenario.options)
    getattr(trainer, scenario.verb)(module, datamodule=data)
    return path.read_text().split()
