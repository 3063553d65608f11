"""What hooks see in `callback_metrics`: with two workers, on each, the same as with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from exact import Rows
from torch.utils.data import DataLoader, TensorDataset

from raytrainer import Module

SAMPLES = 12


def loader(first: float = 0.0) -> DataLoader[Any]:
    """Samples are numbers from `first` on."""
    return DataLoader(TensorDataset(first + torch.arange(float(SAMPLES)).reshape(-1, 1)), 2)


class Looking(Module):
    """Logs metric objects and numbers, and notes what is there at the ends of epochs and evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        objects = ("all", "reset", "late", "each0", "each1", "both")
        self.metrics = torch.nn.ModuleDict({name: torchmetrics.SumMetric() for name in objects})
        self.seen: dict[str, dict[str, float]] = {}
        self.expected: dict[str, dict[str, float]] = {}  # in a test, whose attributes stay in the workers

    def look(self, hook: str) -> None:
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        self.seen[f"{hook} {self.current_epoch}"] = dict(sorted(metrics.items()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for name in ("all", "reset"):
            self.metrics[name].update(batch[0] + self.current_epoch)
            self.log(name, self.metrics[name], on_step=False, on_epoch=True)
        self.log("mean", batch[0].mean() + self.current_epoch, on_step=False, on_epoch=True)
        self.log("most", batch[0].max() + self.current_epoch, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("own", batch[0].sum(), on_step=False, on_epoch=True, reduce_fx=lambda values: values.sum() + 1)
        return self.layer(batch[0]).pow(2).mean()

    def on_train_epoch_end(self) -> None:
        self.look("train")
        self.asked = float(self.metrics["all"].compute())
        self.metrics["reset"].reset()
        self.log("ended", float(self.global_rank))

    def evaluated(self, batch: Any, loader: int) -> None:
        for name, options in ((f"each{loader}", {}), ("both", {"add_dataloader_idx": False})):
            self.metrics[name].update(batch[0] + self.current_epoch)
            self.log(name.removesuffix(str(loader)), self.metrics[name], **options)
        self.log("value", batch[0].mean())
        self.log("on both", batch[0].max(), add_dataloader_idx=False, reduce_fx="max")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self.evaluated(batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self.evaluated(batch, dataloader_idx)

    def hooked(self, hook: str) -> None:
        self.look(hook)
        self.asked_both = float(self.metrics["both"].compute())
        self.log("hooked", float(self.global_rank))
        self.metrics["late"].update(1.0 / self.trainer.world_size)
        self.log("late", self.metrics["late"])

    def on_validation_epoch_end(self) -> None:
        self.hooked("validated")

    def on_test_epoch_end(self) -> None:
        self.hooked("tested")

    def on_validation_end(self) -> None:
        self.look("validation ended")

    def on_test_end(self) -> None:
        self.look("test ended")

    def teardown(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            seen: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(seen, self.seen)
            assert all(one == self.seen for one in seen), seen
        if stage == "test":
            assert self.seen.keys() == self.expected.keys()
            for hook, expected in self.expected.items():
                assert self.seen[hook] == pytest.approx(expected)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-4)


def evaluation(epoch: int) -> dict[str, float]:
    of_first, of_second = (sum(first + n + epoch for n in range(SAMPLES)) for first in (0, 100))
    return {
        "both": of_first + of_second, "each/dataloader_idx_0": of_first, "each/dataloader_idx_1": of_second,
        "on both": 111.0, "value/dataloader_idx_0": 5.5, "value/dataloader_idx_1": 105.5,
    }  # fmt: skip


def training(epoch: int) -> dict[str, float]:
    whole = sum(range(SAMPLES)) + SAMPLES * epoch
    return {"all": whole, "reset": whole, "mean": 5.5 + epoch, "most": 11.0 + epoch, "own": 67.0}


@pytest.mark.parametrize("workers", [1, 2])
def test_values_are_of_this_epoch(workers: int, forked: Any) -> None:
    options: dict[str, Any] = {"strategy": "ddp", "num_processes": 2} if workers == 2 else {"strategy": "local"}
    module, rows = Looking(), Rows()
    trainer = forked(max_epochs=2, num_sanity_val_steps=1, logger=rows, **options)
    trainer.fit(module, loader(), [loader(), loader(100.0)])
    by_rank = 0.5 * (workers - 1)  # the mean over ranks of what each logs of itself
    before: dict[str, float] = {}
    for epoch in range(2):
        before = {**before, **evaluation(epoch)}
        assert module.seen[f"validated {epoch}"] == pytest.approx(before)
        before |= {"hooked": by_rank, "late": 1.0}
        assert module.seen[f"validation ended {epoch}"] == pytest.approx(before)
        before |= training(epoch)
        assert module.seen[f"train {epoch}"] == pytest.approx(before)
        before |= {"ended": by_rank}
    assert {name: float(value) for name, value in trainer.callback_metrics.items()} == pytest.approx(before)
    assert module.asked == training(1)["all"] and module.asked_both == evaluation(1)["both"]
    assert [row["reset"] for _, row in rows.rows if "reset" in row] == [training(0)["reset"], training(1)["reset"]]
    assert [row["late"] for _, row in rows.rows if "late" in row] == [1.0, 1.0]
    tested = evaluation(2)
    module.seen = {}
    module.expected = {"tested 2": tested, "test ended 2": {**tested, "hooked": by_rank, "late": 1.0}}
    trainer.test(module, [loader(), loader(100.0)], verbose=False)
