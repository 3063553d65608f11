"""What callbacks and metric objects do over workers is what they do in one process."""

from __future__ import annotations

import pytest
import torch
import torchmetrics
from exact import Exact, Mortal, run, same
from ray_models import Net, loader, moved, numbers
from torch import nn
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

import raytrainer
from raytrainer import (
    BackboneFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaWorkerCallback,
    MetricError,
    OnExceptionCheckpoint,
    PredictionWriter,
    StochasticWeightAveraging,
    ThroughputMonitor,
)
from raytrainer.checkpointing.checkpoint_format import read_checkpoint
from raytrainer.driver.workers.group_supply import GroupSupply

pytestmark = pytest.mark.usefixtures("ray_session")


class Normed(Net):
    """Its backbone has statistics; in training each worker has its own, so it is normalised by what it has seen."""

    def __init__(self):
        super().__init__()
        self.backbone = self.body[0]
        self.norm = nn.BatchNorm1d(4, affine=False)

    def training_step(self, batch, batch_idx):
        self.norm(batch[0])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def both(one_process, ray_trainer, make, **options):
    """The module after one process with whole batches, and after two workers with half of each."""
    alone, shared = Normed(), Normed()
    options = {"max_epochs": 4, "seed": 3, **options}
    one_process(callbacks=make(), **options).fit(alone, loader(48, 8, shuffle=True), loader(9, 3))
    trainer = ray_trainer(callbacks=make(), **options)
    trainer.fit(shared, loader(48, 4, shuffle=True), loader(9, 3))
    assert moved(Normed(), shared)
    return alone, shared, trainer


def without_statistics(module):
    """Weights alone; statistics of half batches are other ones."""
    return {name: value for name, value in module.state_dict().items() if not name.startswith("norm")}


def close(one, other):
    for name, value in without_statistics(one).items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


def test_averages_come_home(one_process, ray_trainer):
    alone, shared, _ = both(one_process, ray_trainer, lambda: EMAWeightAveraging(0.8))
    close(alone, shared)
    plain = both(one_process, ray_trainer, lambda: None)[1]
    assert not torch.allclose(plain.body[0].weight, shared.body[0].weight, atol=1e-4)


def test_stochastic_weight_averaging(one_process, ray_trainer):
    alone, shared, _ = both(one_process, ray_trainer, lambda: StochasticWeightAveraging(0.01, 2, 1))
    close(alone, shared)
    # means of half batches average to those of whole ones
    torch.testing.assert_close(shared.norm.running_mean, alone.norm.running_mean)
    mean = torch.cat([x for x, _ in loader(48, 8)]).mean(0)
    torch.testing.assert_close(shared.norm.running_mean, mean)


def test_what_is_unfrozen_is_synchronised(one_process, ray_trainer):
    """DDP has been told of the parameters that trained when the run began."""
    alone, shared, _ = both(one_process, ray_trainer, lambda: BackboneFinetuning(2))
    close(alone, shared)
    frozen = both(one_process, ray_trainer, lambda: BackboneFinetuning(9))[1]
    assert torch.equal(frozen.backbone.weight, Normed().backbone.weight)
    assert not torch.equal(shared.backbone.weight, frozen.backbone.weight)


def test_accumulation_by_epoch(one_process, ray_trainer):
    alone, shared, trainer = both(one_process, ray_trainer, lambda: GradientAccumulationScheduler({1: 3, 3: 1}))
    close(alone, shared)
    assert trainer.global_step == 6 + 2 + 2 + 6


@pytest.mark.sample(1)
@pytest.mark.parametrize("callback", [EMAWeightAveraging, StochasticWeightAveraging])
def test_a_killed_worker_changes_nothing(callback, tmp_path, monkeypatch):
    """With workers that are as if of another process; states of callbacks travel as those of metrics do, see below."""
    monkeypatch.setattr(GroupSupply, "take", lambda self, settings: Mortal())

    def make():
        return [callback(0.9) if callback is EMAWeightAveraging else callback(0.004, 1, 2)]

    calm = Exact()
    run(calm, tmp_path, callbacks=make(), snapshot_every=3, num_workers=1)
    module = Exact((0, 17), flag=f"{tmp_path}/flag")
    trainer, _ = run(module, tmp_path, callbacks=make(), snapshot_every=3, num_workers=1)
    assert len(trainer.recoveries) == 1
    assert same(module, calm)


class Fails(Net):
    def training_step(self, batch, batch_idx):
        if self.global_step == 5 and self.global_rank == 1:
            raise ArithmeticError("the fifth")
        return super().training_step(batch, batch_idx)


@pytest.mark.sample(0)
def test_the_newest_snapshot_is_saved_after_an_error(ray_trainer, tmp_path):
    saving = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(ArithmeticError):
        ray_trainer(max_epochs=1, callbacks=saving, snapshot_every=2).fit(Fails(), loader(48, 2))
    assert read_checkpoint(saving.ckpt_path)["progress"]["step"] == 4
    resumed = ray_trainer(max_epochs=1)
    resumed.fit(Net(), loader(48, 2), ckpt_path=saving.ckpt_path)
    assert resumed.global_step == 12


def test_predictions_of_all_workers(ray_trainer, tmp_path):
    class Doubles(Net):
        def predict_step(self, batch, batch_idx):
            return {"number": batch[:, 0], "double": 2 * batch}

    trainer = ray_trainer(callbacks=PredictionWriter(tmp_path / "p"))
    assert trainer.predict(Doubles(), numbers(23, 3), return_predictions=False) is None
    assert len(list((tmp_path / "p").iterdir())) == 2
    table = PredictionWriter.read(tmp_path / "p")
    assert table["number"].to_pylist() == list(range(23))
    assert table["double"].to_pylist() == [[2.0 * i] for i in range(23)]


class Rows(raytrainer.Logger):
    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(dict(metrics))

    def log_hyperparams(self, params):
        pass


def test_rates_are_those_of_all_workers(ray_trainer):
    """A worker's rate is of its own clock, so only the relation of two rates is certain."""
    rows = Rows()
    callbacks = [
        ThroughputMonitor(tokens=lambda batch: 10),
        LambdaWorkerCallback(on_train_batch_end=lambda *args: None),
    ]
    ray_trainer(max_epochs=1, callbacks=callbacks, logger=rows, log_every_n_steps=3).fit(Net(), loader(48, 4))
    found = [{n.split("/")[1]: v for n, v in r.items() if n.startswith("throughput")} for r in rows.rows]
    found = [r for r in found if r]
    assert len(found) == 2
    for rates in found:
        assert rates["samples_per_second"] == pytest.approx(4 * rates["batches_per_second"])
        assert rates["tokens_per_second"] == pytest.approx(10 * rates["batches_per_second"])


class Scored(Net):
    def __init__(self):
        super().__init__()
        self.auc, self.acc, self.mean = BinaryAUROC(), BinaryAccuracy(), torchmetrics.MeanMetric()

    def answers(self, batch):
        x, y = batch
        return torch.sigmoid(x[:, 0] + x[:, 1]), (y[:, 0] > 0).long()

    def validation_step(self, batch, batch_idx):
        preds, target = self.answers(batch)
        self.auc.update(preds, target)
        self.acc(preds, target)
        self.mean.update(preds)
        self.log("auc", self.auc)
        self.log("acc", self.acc, on_step=True, on_epoch=True)
        self.log("mean", self.mean)


@pytest.mark.sample(1)
@pytest.mark.parametrize("samples,batch_size", [(23, 4), (3, 4)])
def test_metric_objects_over_uneven_data(samples, batch_size, ray_trainer):
    """The last batch is smaller, and one worker has more batches; or one has none at all."""
    from sklearn.metrics import roc_auc_score  # here, as workers import this file

    module, val = Scored(), loader(samples, batch_size)
    trainer = ray_trainer(max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, loader(16, 4), val)
    parts = [module.answers(batch) for batch in val]
    preds, target = torch.cat([p for p, _ in parts]), torch.cat([t for _, t in parts])
    found = {name: float(trainer.callback_metrics[name]) for name in ("auc", "acc_epoch", "mean")}
    assert found == pytest.approx(
        {
            "auc": roc_auc_score(target.numpy(), preds.numpy()),
            "acc_epoch": float(BinaryAccuracy()(preds, target)),
            "mean": float(preds.mean()),
        },
        rel=1e-5,
    )


def test_ranks_that_log_different_metric_objects(ray_trainer):
    class Differs(Scored):
        def validation_step(self, batch, batch_idx):
            self.acc.update(*self.answers(batch))
            self.log("acc" if self.global_rank == 0 else "accuracy", self.acc)

    with pytest.raises(MetricError, match="rank 0 did not log 'accuracy'; rank 1 did not log 'acc'"):
        ray_trainer().validate(Differs(), loader(16, 4))


@pytest.mark.sample(0)
def test_metric_states_survive_a_killed_worker(tmp_path):
    class Counted(Exact):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.sum = torchmetrics.SumMetric()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.sum.update(batch[2].float())
            self.log("sum", self.sum, on_step=False, on_epoch=True)
            return loss

    module = Counted((1, 11), "kill", f"{tmp_path}/flag")
    trainer, rows = run(module, tmp_path, strategy="ddp", num_processes=2, snapshot_every=1)
    assert len(trainer.recoveries) == 1
    sums = [row["sum"] for _, row in rows if "sum" in row]
    # indices 0 to 52, and one of them twice
    assert len(sums) == 3 and all(1378 <= value <= 1378 + 52 for value in sums)
