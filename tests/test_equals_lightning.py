"""The same module in Lightning and here: hooks, metrics at each hook, rows, rates, checkpoints and weights are equal.

Where Lightning is installed. What differs on purpose is left out; the comparison's page tells of it.
"""

from __future__ import annotations

import logging
import os
import random
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import raytrainer

HOOKS = [
    "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad",
    "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_epoch_end", "on_train_end",
    "on_validation_model_eval", "on_validation_model_train", "on_validation_start", "on_validation_epoch_start",
    "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end",
]  # fmt: skip


def choices(seed: int) -> dict[str, Any]:
    """A configuration that both understand in the same way."""
    draw = random.Random(seed)
    validates = draw.random() < 0.8
    return {
        "trainer": {
            "max_epochs": draw.randint(1, 4),
            "min_epochs": 0,
            "accumulate_grad_batches": draw.choice([1, 1, 2, 3]),
            "gradient_clip_val": draw.choice([None, 0.05]),
            "check_val_every_n_epoch": draw.choice([1, 1, 2]) if validates else 1,
            "limit_train_batches": draw.choice([1.0, 1.0, 3, 0.7]),
            "num_sanity_val_steps": draw.choice([0, 2]),
            "log_every_n_steps": draw.choice([1, 1, 2]),
            "val_check_interval": draw.choice([1.0, 1.0, 0.5, 2]),
        },
        "samples": draw.choice([6, 8, 9, 11]),
        "validation": draw.choice([2, 3, 6]) if validates else 0,
        "optimizer": draw.choice(["sgd", "adam"]),
        "scheduler": draw.choice([None, "step", "epoch"]),
        "dict": draw.random() < 0.5,
        "monitor": draw.choice([None, "val"] if validates else [None]),
        "logs": [
            (f"m{i}", *draw.choice([(None, None), (True, True), (False, True)]), draw.choice(["mean", "max"]))
            for i in range(draw.randint(0, 3))
        ],
        "stop": draw.choice([None, "on_train_epoch_end"]),
    }


def module(base: type, config: dict[str, Any]) -> Any:
    """The user's class, over the one or the other library's Module."""

    class Net(base):  # type: ignore[misc]
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 2)
            self.events: list[Any] = []

        def note(self, hook, *more):
            if not self.trainer.sanity_checking:
                metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
                self.events.append((hook, self.global_step, self.current_epoch, metrics, *more))
            if hook == config["stop"] and self.global_step >= 2:
                self.trainer.should_stop = True

        def training_step(self, batch, batch_idx):
            self.note("training_step", batch_idx, batch[0].sum().item())
            for number, (name, on_step, on_epoch, reduce) in enumerate(config["logs"]):
                options = {"on_step": on_step, "on_epoch": on_epoch} if on_step is not None else {}
                self.log(name, float(batch_idx * 3 + number), reduce_fx=reduce, **options)
            loss = self.layer(batch[0]).pow(2).mean()
            return {"loss": loss, "more": 1} if config["dict"] else loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            rates = [group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
            self.note("on_train_batch_end", batch_idx, sorted(outputs), outputs["loss"].item(), rates)

        def validation_step(self, batch, batch_idx):
            self.log("val", self.layer(batch[0]).abs().mean())

        def configure_optimizers(self):
            kind = torch.optim.SGD if config["optimizer"] == "sgd" else torch.optim.AdamW
            optimizer = kind(self.parameters(), 0.05)
            if config["scheduler"] is None:
                return optimizer
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
            return [optimizer], [{"scheduler": scheduler, "interval": config["scheduler"]}]

    for hook in HOOKS:

        def noting(self, *args, hook=hook):
            self.note(hook)
            return getattr(super(Net, self), hook)(*args)

        setattr(Net, hook, noting)
    return Net()


def fit(library: Any, base: type, logger: type, config: dict[str, Any], folder: Any, **options: Any) -> dict[str, Any]:
    class Rows(logger):  # type: ignore[misc]
        name = version = "rows"

        def __init__(self):
            super().__init__()
            self.rows: list[Any] = []

        def log_metrics(self, metrics, step=None):
            self.rows += [(name, step, float(value)) for name, value in metrics.items() if name != "epoch"]

        def log_hyperparams(self, params, *args, **kwargs):
            pass

    net, rows = module(base, config), Rows()
    monitor = {"monitor": "val", "save_top_k": 2} if config["monitor"] else {}
    saver = library.callbacks.ModelCheckpoint(folder, filename="{epoch}-{step}", **monitor)
    trainer = library.Trainer(
        logger=rows, callbacks=[saver], enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        **config["trainer"], **options,
    )  # fmt: skip
    torch.manual_seed(5)
    numbers = torch.randn(20, 4)
    train, val = (TensorDataset(numbers[:size]) for size in (config["samples"], config["validation"]))
    trainer.fit(net, DataLoader(train, 2), DataLoader(val, 2) if config["validation"] else None)
    return {
        "events": net.events,
        "rows": sorted(rows.rows),
        "files": sorted(os.listdir(folder)) if folder.is_dir() else [],
        "best": os.path.basename(saver.best_model_path),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "step": trainer.global_step,
        "weights": torch.cat([value.flatten() for value in net.parameters()]).tolist(),
    }


def alike(one: Any, other: Any) -> bool:
    """Equal but for rounding."""
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(value, other[name]) for name, value in one.items())
    return one == (pytest.approx(other, rel=1e-5, abs=1e-7) if isinstance(other, float) else other)


@pytest.mark.parametrize("seed", range(10))
def test_one_module_in_both(seed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # which Lightning sets, and leaves behind
    lightning = pytest.importorskip("lightning.pytorch")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    config = choices(seed)
    theirs = fit(
        lightning, lightning.LightningModule, lightning.loggers.logger.Logger, config, tmp_path / "theirs",
        accelerator="cpu",
    )  # fmt: skip
    ours = fit(raytrainer, raytrainer.Module, raytrainer.Logger, config, tmp_path / "ours")
    for name, expected in theirs.items():
        pairs = zip(expected, ours[name], strict=False) if isinstance(expected, list) else ()
        assert alike(expected, ours[name]), (name, config, [pair for pair in pairs if not alike(*pair)][:1])
