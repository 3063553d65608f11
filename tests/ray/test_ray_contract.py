"""The contract on two Ray workers: one broad run, results of every verb, the order of hooks."""

from __future__ import annotations

import csv
from enum import Enum
from typing import Any, NamedTuple

import hook_order
import pytest
import torch
from ray_models import Net, eventually, loader, numbers, table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from raytrainer import (
    Callback,
    CSVLogger,
    DataModule,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    Module,
    WorkerCallback,
)


class Pair(NamedTuple):
    x: Tensor
    extra: dict[str, Any]


def collate(samples: list[tuple[Tensor, Tensor]]) -> Pair:
    return Pair(torch.stack([x for x, _ in samples]), {"y": [torch.stack([y for _, y in samples])], "tag": "text"})


class Data(DataModule):
    def __init__(self, notes: str, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.ready = 0

    def note(self, text: str) -> None:
        with open(self.hparams.notes, "a") as file:
            file.write(text + "\n")

    def prepare_data(self) -> None:
        self.note("prepare_data")

    def setup(self, stage: str) -> None:
        self.ready += 1
        self.samples = table(44)
        self.note(f"setup {stage} {self.trainer.global_rank}")

    def teardown(self, stage: str) -> None:
        self.note(f"teardown {stage} {self.trainer.global_rank}")

    def loader(self, **options: Any) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=self.hparams.batch_size, collate_fn=collate, **options)

    def train_dataloader(self) -> Any:
        return self.loader(shuffle=True)

    def val_dataloader(self) -> Any:
        return [self.loader(), DataLoader(table(9, seed=1), batch_size=2, collate_fn=collate)]

    def test_dataloader(self) -> Any:
        return self.loader()

    predict_dataloader = test_dataloader

    def on_after_batch_transfer(self, batch: Pair, dataloader_idx: int) -> Pair:
        assert isinstance(batch, Pair)
        return batch._replace(x=batch.x * 2.0)

    def state_dict(self) -> dict[str, Any]:
        return {"ready": self.ready}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ready = state_dict["ready"]


class Mode(Enum):
    FAST = 1


class Options(NamedTuple):
    mode: Mode
    layer: type[nn.Module]


class Broad(Module):
    def __init__(self, lr: float = 0.1, width: int = 6, options: Options | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.history: list[tuple[int, float]] = []
        self.events = {"train_end": 0, "batches": 0}
        self.register_buffer("seen", torch.zeros(1))
        self.norm = nn.BatchNorm1d(4)

    def setup(self, stage: str) -> None:
        if not hasattr(self, "body"):
            self.body = nn.Sequential(nn.Linear(4, self.hparams.width), nn.ReLU(), nn.Dropout(0.1))

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.head = nn.Linear(self.hparams.width, 1)

    def forward(self, batch: Pair) -> Tensor:
        return self.head(self.body(self.norm(batch.x)))  # type: ignore[no-any-return]

    def training_step(self, batch: Pair, batch_idx: int) -> dict[str, Any]:
        assert self.training and batch.x.device == self.device
        self.seen += len(batch.x)
        loss = nn.functional.mse_loss(self(batch), batch.extra["y"][0])
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        return {"loss": loss, "other": 1}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["other"] == 1 and not outputs["loss"].requires_grad
        self.events["batches"] += 1

    def validation_step(self, batch: Pair, batch_idx: int, dataloader_idx: int) -> None:
        assert not self.training and not torch.is_grad_enabled()
        self.log("val", nn.functional.mse_loss(self(batch), batch.extra["y"][0]))
        self.log("val_all", float(dataloader_idx), add_dataloader_idx=False)

    def test_step(self, batch: Pair, batch_idx: int) -> None:
        self.log_dict({"test": nn.functional.mse_loss(self(batch), batch.extra["y"][0]), "one": 1.0})

    def predict_step(self, batch: Pair, batch_idx: int) -> dict[str, Any]:
        return {"y": self(batch), "index": batch_idx}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/dataloader_idx_0"}}

    def on_train_epoch_end(self) -> None:
        rate = self.optimizers().param_groups[0]["lr"]
        self.history.append((self.current_epoch, rate))
        self.hparams.lr = rate

    def on_train_end(self) -> None:
        self.events["train_end"] += 1


class Counts(Callback):
    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.ended = 0

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.epochs.append(float(trainer.callback_metrics["val/dataloader_idx_0"]))

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        assert module.head.weight.abs().sum() > 0
        self.ended += 1


class Halve(WorkerCallback):
    """Beside the module: scales gradients, on every worker."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        for parameter in module.parameters():
            parameter.grad *= 0.5
        module.log("halved", 1.0)


def test_a_broad_run(ray_trainer, tmp_path):
    notes = tmp_path / "notes"
    data, module, counts = Data(str(notes)), Broad(options=Options(Mode.FAST, nn.ReLU)), Counts()
    checkpoint = ModelCheckpoint(monitor="val/dataloader_idx_0", save_last=True, dirpath=tmp_path / "saved")
    trainer = ray_trainer(
        max_epochs=4,
        callbacks=[
            counts,
            Halve(),
            checkpoint,
            EarlyStopping("val/dataloader_idx_0", patience=10),
            LearningRateMonitor(),
        ],
        logger=CSVLogger(tmp_path, name="log"),
        log_every_n_steps=1,
        seed=1,
    )
    trainer.fit(module, datamodule=data)

    # 44 samples, 22 a worker, 6 batches of 4 (the last of 2)
    assert trainer.state.finished and not trainer.interrupted and not trainer.should_stop
    assert (trainer.world_size, trainer.num_training_batches) == (2, 6)
    assert (trainer.global_step, trainer.current_epoch) == (24, 4)
    assert trainer.num_val_batches == [6, 3]
    # the driver's module: layers made in workers, weights, buffers, hyperparameters and plain attributes
    assert {"body.0.weight", "head.weight", "norm.running_mean"} <= set(module.state_dict())
    assert module.norm.num_batches_tracked == 24 and module.norm.running_mean.abs().sum() > 0
    assert module.seen == 4 * 22
    rates = [0.1, 0.05, 0.025, 0.0125]  # the plateau scheduler steps after the epoch's hook
    assert module.history == list(enumerate(rates)) and module.hparams.lr == 0.0125
    assert module.events == {"train_end": 1, "batches": 24}
    assert module.hparams_initial.lr == 0.1
    assert data.ready == 1
    assert counts.ended == 1 and len(counts.epochs) == 4
    metrics = trainer.callback_metrics
    assert {
        "loss",
        "loss_step",
        "loss_epoch",
        "val/dataloader_idx_0",
        "val/dataloader_idx_1",
        "val_all",
        "halved",
    } <= set(metrics)
    assert metrics["val_all"] == pytest.approx(9 / 53) and float(metrics["val/dataloader_idx_0"]) == counts.epochs[-1]
    assert set(trainer.progress_bar_metrics) == {"loss_step", "loss_epoch"}
    assert trainer.logged_metrics["loss_epoch"] == metrics["loss_epoch"]
    with open(tmp_path / "log/version_0/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["loss_step"]] == list(range(24))
    # once on the node; on every worker
    lines = notes.read_text().split("\n")
    assert lines.count("prepare_data") == 1
    for rank in (0, 1):
        assert lines.count(f"setup fit {rank}") == lines.count(f"teardown fit {rank}") == 1
    # the best checkpoint is the weights of its epoch
    best = Broad.load_from_checkpoint(checkpoint.best_model_path, strict=False)
    assert best.hparams.options == Options(Mode.FAST, nn.ReLU) and type(best.hparams.options) is Options
    assert best.hparams.width == 6 and checkpoint.best_model_score == pytest.approx(min(counts.epochs))

    # the whole state at the end
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    # later verbs use what was trained; without a model, the best of it
    validated = trainer.validate(verbose=False)
    assert trainer.ckpt_path == checkpoint.best_model_path and module.trainer is trainer
    assert [set(found) for found in validated] == [
        {"val/dataloader_idx_0", "val_all"},
        {"val/dataloader_idx_1", "val_all"},
    ]
    assert validated[0]["val/dataloader_idx_0"] == pytest.approx(min(counts.epochs), rel=1e-6)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert tested["test"] == pytest.approx(counts.epochs[-1], rel=1e-6) and tested["one"] == 1.0
    predictions = trainer.predict(module, datamodule=data)
    assert [len(p["y"]) for p in predictions] == [4] * 11
    assert notes.read_text().split("\n").count("setup predict 1") == 1
    assert not hasattr(data, "samples")  # the driver's DataModule was never set up
    module.eval()
    with torch.no_grad():
        expected = module(Pair(table(44).tensors[0] * 2.0, {}))
    torch.testing.assert_close(torch.cat([p["y"] for p in predictions]), expected)

    # and a fit that goes on from the checkpoint, as from what was saved after the run
    resumed = [Broad(), Broad()]
    for module, path in zip(resumed, (checkpoint.last_model_path, tmp_path / "end.ckpt"), strict=True):
        again = ray_trainer(max_epochs=5, seed=1)
        again.fit(module, datamodule=Data(str(notes)), ckpt_path=path)
        assert (again.global_step, again.current_epoch) == (30, 5)
        assert module.norm.num_batches_tracked == 30
    assert all(map(torch.equal, resumed[0].state_dict().values(), resumed[1].state_dict().values()))


@pytest.mark.parametrize("name", hook_order.SCENARIOS)
def test_hooks_come_in_the_order_of_one_process(name, tmp_path, ray_trainer):
    scenario = hook_order.SCENARIOS[name]
    # the driver's DataModule is given the state of rank 0's, which in process is the same object
    brought_home = ["data.state_dict"] if scenario.verb == "fit" and scenario.with_data else []
    assert hook_order.run_scenario(scenario, tmp_path / "calls", ray_trainer) == [*scenario.expected, *brought_home]


def check_evaluation(workers: int, ray_trainer: Any, one_process: Any) -> None:
    """Uneven data, a last batch that is smaller, fewer batches than a whole number for each worker."""
    module = Net()
    loaders = [loader(27, 4), loader(5, 5)]  # 7 batches, 1 batch
    trainer = ray_trainer(num_processes=workers)
    for verb in ("validate", "test"):
        here = getattr(one_process(), verb)(module, loaders, verbose=False)
        there = getattr(trainer, verb)(module, loaders, verbose=False)
        assert here[0]["samples/dataloader_idx_0"] == 27.0
        assert [set(metrics) for metrics in there] == [set(metrics) for metrics in here]
        for metrics, expected in zip(there, here, strict=True):
            assert metrics == pytest.approx(expected, rel=1e-12)


def test_the_mean_is_weighted_by_batch_size(ray_trainer):
    class Mean(Net):
        def validation_step(self, batch, batch_idx):
            self.log("mean", batch.mean())
            self.log("weighted", float(batch_idx), batch_size=10 if batch_idx else 1)

    (metrics,) = ray_trainer().validate(Mean(), numbers(7, 3), verbose=False)
    assert metrics["mean"] == 3.0  # of 0..6; the batches' means 1, 4 and 6 have another
    # rank 0 has the batches of index 0 and 1 (of its own), rank 1 one of index 0
    assert metrics["weighted"] == pytest.approx(10 / 12)


def check_predictions(workers: int, ray_trainer: Any, one_process: Any) -> None:
    class Echo(Net):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return {"x": batch * 2 + dataloader_idx, "text": f"{int(batch[0])}"}

    module, loaders = Echo(), [numbers(11, 2), numbers(2, 2), numbers(9, 4)]
    here = one_process().predict(module, loaders)
    there = ray_trainer(num_processes=workers).predict(module, loaders)
    assert [len(outputs) for outputs in there] == [6, 1, 3]
    for outputs, expected in zip(there, here, strict=True):
        for output, one in zip(outputs, expected, strict=True):
            assert output["text"] == one["text"] and torch.equal(output["x"], one["x"])
    only = ray_trainer(num_processes=workers, limit_predict_batches=2).predict(module, numbers(20, 2))
    assert torch.cat([output["x"] for output in only]).flatten().tolist() == [2.0 * i for i in range(4 * workers)]
    assert ray_trainer(num_processes=workers).predict(module, numbers(4, 2), return_predictions=False) is None


def test_evaluation_is_that_of_one_process(ray_trainer, one_process):
    check_evaluation(2, ray_trainer, one_process)


def test_predictions_come_in_the_loaders_order(ray_trainer, one_process):
    check_predictions(2, ray_trainer, one_process)


def test_limits_are_per_worker(ray_trainer):
    trainer = ray_trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=0.5, num_sanity_val_steps=0)
    trainer.fit(Net(), loader(64, 4), loader(64, 4))
    assert trainer.global_step == 3 and trainer.num_val_batches == [4]
    assert trainer.callback_metrics["samples"] == 32


def test_stopping_by_steps_by_the_module_and_by_a_callback(ray_trainer):
    class Stops(Net):
        def training_step(self, batch, batch_idx):
            if self.global_rank == 1 and self.global_step == 3:
                self.trainer.should_stop = True
            return super().training_step(batch, batch_idx)

    trainer = ray_trainer(max_steps=5)
    trainer.fit(Net(), loader(24, 4))
    assert (trainer.global_step, trainer.current_epoch) == (5, 1)
    trainer = ray_trainer(max_epochs=50)
    trainer.fit(Stops(), loader(16, 4))
    assert trainer.should_stop and 4 <= trainer.global_step < 100
    trainer = ray_trainer(
        max_epochs=50, callbacks=EarlyStopping("loss", stopping_threshold=1e9, check_on_train_epoch_end=True)
    )
    trainer.fit(Net(), loader(16, 4))
    assert trainer.current_epoch == 1


def test_what_the_user_prints_reaches_the_driver(ray_trainer, capfd):
    class Prints(Net):
        def on_train_start(self):
            # Ray folds lines that differ in numbers alone
            print(["alpha", "beta"][self.global_rank], "says hello")
            self.print("said once")

    ray_trainer(max_epochs=1, worker_output="all").fit(Prints(), loader(16, 4))
    captured = ""

    def arrived() -> bool:
        nonlocal captured
        captured += "".join(capfd.readouterr())
        return all(text in captured for text in ("alpha says hello", "beta says hello", "said once"))

    eventually(arrived, "the workers' lines")
    assert captured.count("said once") == 1
    assert "(rank 0" in captured and "(rank 1" in captured


@pytest.mark.sample(0)
@pytest.mark.late(3)
def test_three_workers(ray_trainer, one_process):
    check_evaluation(3, ray_trainer, one_process)
    check_predictions(3, ray_trainer, one_process)
