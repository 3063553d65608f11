"""torchmetrics objects in `self.log`, in one process; states of several workers come together as those of one."""

from __future__ import annotations

import pytest
import torch
import torchmetrics
from exact import Died, Exact, Rows, run, same
from tiny import Tiny, data
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryF1Score, BinaryPrecision, BinaryRecall

from raytrainer import Callback, MetricError, ModelCheckpoint
from raytrainer.metrics import metric_objects


def answers(batch):
    x, y = batch
    return torch.sigmoid(x[:, 0] + 0.5 * y[:, 0]), (y[:, 0] > 0).long()


def whole(loader):
    parts = [answers(batch) for batch in loader]
    return torch.cat([p for p, _ in parts]), torch.cat([t for _, t in parts])


class Scored(Tiny):
    def __init__(self):
        super().__init__()
        self.acc, self.auc, self.val_acc, self.test_auc = (
            BinaryAccuracy(),
            BinaryAUROC(),
            BinaryAccuracy(),
            BinaryAUROC(),
        )
        self.steps = []

    def training_step(self, batch, batch_idx):
        self.steps.append(float(self.acc(*answers(batch))))
        self.log("acc", self.acc, on_step=True, on_epoch=True)
        self.auc.update(*answers(batch))
        self.log("auc", self.auc, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.val_acc.update(*answers(batch))
        self.log("val_acc", self.val_acc)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.test_auc.update(*answers(batch))
        self.log("test_auc", self.test_auc, add_dataloader_idx=False)


def test_step_and_epoch_values(local_trainer):
    module, rows = Scored(), Rows()
    train, val = data(26, batch_size=3), data(7, batch_size=2, seed=5)
    trainer = local_trainer(max_epochs=3, logger=rows, log_every_n_steps=1, val_check_interval=4)
    trainer.fit(module, train, val)
    accuracy, auc = BinaryAccuracy()(*whole(train)), BinaryAUROC()(*whole(train))
    logged = {name: [row[name] for _, row in rows.rows if name in row] for name in trainer.logged_metrics}
    assert logged["acc_step"] == pytest.approx(module.steps) and len(set(module.steps)) > 1
    assert logged["acc_epoch"] == pytest.approx([float(accuracy)] * 3)  # so it was reset in between
    assert logged["auc"] == pytest.approx([float(auc)] * 3)
    assert logged["val_acc"] == pytest.approx([float(BinaryAccuracy()(*whole(val)))] * 6)
    assert trainer.callback_metrics["acc"] == accuracy
    assert not module.acc.update_called and not module.val_acc.update_called


def test_epochs_and_validations_begin_anew(local_trainer):
    class Sums(Tiny):
        def __init__(self):
            super().__init__()
            self.seen, self.val_seen = torchmetrics.SumMetric(), torchmetrics.SumMetric()

        def training_step(self, batch, batch_idx):
            self.seen.update(float(len(batch[0])))
            self.log("seen", self.seen, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.val_seen.update(float(len(batch[0])))
            self.log("val_seen", self.val_seen)

    rows = Rows()
    local_trainer(max_epochs=3, logger=rows, val_check_interval=4).fit(Sums(), data(20), data(7))
    assert [row["seen"] for _, row in rows.rows if "seen" in row] == [20.0] * 3
    assert [row["val_seen"] for _, row in rows.rows if "val_seen" in row] == [7.0] * 6


def test_one_metric_over_several_loaders(local_trainer):
    loaders = [data(6, seed=3), data(5, seed=4)]
    found = local_trainer().test(Scored(), loaders, verbose=False)
    (p, t), (q, u) = map(whole, loaders)
    assert found[0]["test_auc"] == pytest.approx(float(BinaryAUROC()(torch.cat([p, q]), torch.cat([t, u]))))


def test_collections_share_states(local_trainer):
    class Many(Tiny):
        def __init__(self):
            super().__init__()
            self.scores = MetricCollection([BinaryPrecision(), BinaryRecall(), BinaryF1Score()], prefix="v_")

        def validation_step(self, batch, batch_idx):
            self.scores.update(*answers(batch))
            self.log_dict(self.scores)

    module, val = Many(), data(15, batch_size=4)
    trainer = local_trainer(max_epochs=2)
    trainer.fit(module, data(4), val)
    assert any(len(group) > 1 for group in module.scores.compute_groups.values())
    assert not module.scores._state_is_copy  # copying all states in each step would be slow
    for name, kind in (("v_BinaryPrecision", BinaryPrecision), ("v_BinaryF1Score", BinaryF1Score)):
        assert trainer.callback_metrics[name] == kind()(*whole(val))


def test_wrappers_and_compositions(local_trainer):
    class Wrapped(Tiny):
        def __init__(self):
            super().__init__()
            self.low, self.high = BinaryAccuracy(), BinaryAUROC()
            self.both = self.low + self.high

        def validation_step(self, batch, batch_idx):
            self.both.update(*answers(batch))
            self.log("both", self.both)

    val = data(15, batch_size=4)
    trainer = local_trainer(max_epochs=2)
    trainer.fit(Wrapped(), data(4), val)
    expected = BinaryAccuracy()(*whole(val)) + BinaryAUROC()(*whole(val))
    assert trainer.callback_metrics["both"] == pytest.approx(float(expected))


@pytest.mark.parametrize("cuts", [(4, 3, 8), (0, 15, 0), (1, 0, 14)])
@pytest.mark.parametrize(
    "make",
    [BinaryAccuracy, BinaryAUROC, lambda: BinaryAUROC(thresholds=7), torchmetrics.PearsonCorrCoef,
     torchmetrics.MaxMetric, torchmetrics.CatMetric, torchmetrics.MeanMetric, torchmetrics.R2Score],
)  # fmt: skip
def test_states_of_workers_come_together(make, cuts):
    preds, target = whole(data(15))
    target = target.float() if make in (torchmetrics.PearsonCorrCoef, torchmetrics.R2Score) else target

    def update(metric, p, t):
        args = (p,) if isinstance(metric, torchmetrics.aggregation.BaseAggregator) else (p, t)
        for pieces in zip(*(a.split(2) for a in args), strict=True):
            if len(p):
                metric.update(*pieces)
        return metric

    workers = [update(make(), p, t) for p, t in zip(preds.split(cuts), target.split(cuts), strict=True)]
    states = [metric_objects.states_of(worker) for worker in workers]
    alone = update(make(), preds, target).compute()
    if alone.numel() > 1:
        with pytest.raises(MetricError, match=r"'m', <CatMetric>.*shape \(15,\)"):
            metric_objects.compute(workers[0], states, "m")
        return
    assert metric_objects.compute(workers[0], states, "m") == pytest.approx(float(alone), rel=1e-5)
    metric_objects.reset(workers[0])
    torch.testing.assert_close(update(workers[0], preds, target).compute(), alone)


def test_means_count_by_their_updates():
    class Average(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("average", torch.tensor(0.0), dist_reduce_fx="mean")

        def update(self, value):
            self.average += (value - self.average) / self._update_count

        def compute(self):
            return self.average

    workers = [Average(), Average(), Average()]
    for index, values in enumerate(([1.0], [2.0, 3.0, 7.0], [])):
        for value in values:
            workers[index].update(value)
    states = [metric_objects.states_of(worker) for worker in workers]
    assert metric_objects.compute(workers[0], states, "m") == pytest.approx(13 / 4)


def test_what_is_no_state_counts_too(local_trainer):
    class Windows(Tiny):
        def __init__(self):
            super().__init__()
            self.called, self.updated = (torchmetrics.aggregation.RunningMean(window=3) for _ in range(2))

        def training_step(self, batch, batch_idx):
            self.called(float(batch_idx))
            self.updated.update(float(batch_idx))
            self.log("called", self.called, on_step=False, on_epoch=True)
            self.log("updated", self.updated, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    rows = Rows()
    local_trainer(max_epochs=2, logger=rows).fit(Windows(), data(20))
    assert [(row["called"], row["updated"]) for _, row in rows.rows if "called" in row] == [(8.0, 8.0)] * 2


def test_windows_of_several_workers_are_refused():
    workers = [torchmetrics.aggregation.RunningMean(window=3) for _ in range(2)]
    for value in range(6):
        workers[0](float(value))
    states = [metric_objects.states_of(worker) for worker in workers]
    assert states[0] and not states[1]
    assert metric_objects.compute(workers[0], states, "m") == 4.0
    copy = torchmetrics.aggregation.RunningMean(window=3)
    metric_objects.load_states(copy, states[0])  # as from a checkpoint
    for metric in (copy, workers[0]):
        metric(9.0)
        assert float(metric.compute()) == 6.0
    workers[1](1.0)
    states = [metric_objects.states_of(worker) for worker in workers]
    with pytest.raises(MetricError, match=r"'m', <RunningMean>.*rank_zero_only=True.*or log MeanMetric itself"):
        metric_objects.compute(workers[0], states, "m")


class Exactly(Exact):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.error, self.auc = torchmetrics.MeanSquaredError(), BinaryAUROC()
        self.auc.persistent(True)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        x, y, _ = batch
        out = self.net(x).detach()
        self.error(out, y)
        self.log("error", self.error, on_step=True, on_epoch=True)
        self.auc.update(out[:, 0].sigmoid(), (y[:, 0] > 0).long())
        self.log("auc", self.auc, on_step=False, on_epoch=True)
        return loss


@pytest.mark.parametrize("batches", [3, 8, 14, 20])
def test_exact_resume(batches, tmp_path):
    calm = Exactly()
    _, rows = run(calm, tmp_path)
    with pytest.raises(Died):
        run(Exactly((0, batches), flag=f"{tmp_path}/flag"), tmp_path, save_every=1)
    module = Exactly()
    _, resumed = run(module, tmp_path, save_every=1, ckpt_path="last")
    assert same(module.net, calm.net)
    assert resumed == rows[-len(resumed) :]
    assert any("error_epoch" in row and "auc" in row for _, row in resumed)


def test_a_run_that_ends_within_an_epoch_keeps_their_states(local_trainer, tmp_path):
    class Counts(Tiny):
        def __init__(self):
            super().__init__()
            self.seen = torchmetrics.SumMetric()

        def training_step(self, batch, batch_idx):
            self.seen.update(float(len(batch[0])))
            self.log("seen", self.seen, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    trainer = local_trainer(max_steps=3)
    trainer.fit(Counts(), data(10))
    assert trainer.callback_metrics["seen"] == 6.0
    trainer.save_checkpoint(tmp_path / "half")
    trainer = local_trainer(max_epochs=2)
    trainer.fit(Counts(), data(10), ckpt_path=tmp_path / "half")
    assert trainer.callback_metrics["seen"] == 10.0
    rows = Rows()
    local_trainer(max_epochs=2, logger=rows).fit(Counts(), data(10), ckpt_path=tmp_path / "half")
    assert [row["seen"] for _, row in rows.rows if "seen" in row] == [10.0, 10.0]


@pytest.mark.parametrize("on_epoch", [False, True])
def test_they_begin_anew_with_each_epoch(on_epoch, local_trainer):
    counts = []

    class Steps(Tiny):
        def __init__(self):
            super().__init__()
            self.mean = torchmetrics.MeanMetric()

        def training_step(self, batch, batch_idx):
            self.mean(1.0)
            counts.append(self.mean.update_count)
            self.log("mean", self.mean, on_step=True, on_epoch=on_epoch)
            return super().training_step(batch, batch_idx)

    local_trainer(max_epochs=2).fit(Steps(), data(6))
    assert counts == [1, 2, 3, 1, 2, 3]


def test_names_of_checkpoints_have_those_of_the_epoch(local_trainer, tmp_path):
    class Epochs(Scored):
        def training_step(self, batch, batch_idx):
            self.acc.update(torch.tensor([1.0]), torch.tensor([self.current_epoch % 2]))
            self.log("acc", self.acc, on_step=False, on_epoch=True)
            return super(Scored, self).training_step(batch, batch_idx)

    saving = ModelCheckpoint(tmp_path, monitor="val_acc", filename="{epoch}-{acc:.0f}", save_top_k=-1)
    local_trainer(max_epochs=3, callbacks=saving).fit(Epochs(), data(4), data(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"epoch={epoch}-acc={epoch % 2}.ckpt" for epoch in range(3)
    ]


def test_what_is_left_unfinished_is_forgotten(local_trainer):
    """An error, or Ctrl-C, in the middle of an epoch: the next run counts from its own beginning."""

    class Fails(Scored):
        def test_step(self, batch, batch_idx):
            super().test_step(batch, batch_idx)
            if batch_idx == 2:
                raise ArithmeticError

    module = Fails()
    with pytest.raises(ArithmeticError):
        local_trainer().test(module, data(20), verbose=False)
    assert not module.test_auc.update_called


def test_the_sanity_check_leaves_no_trace(local_trainer):
    class Looks(Callback):
        def on_sanity_check_end(self, trainer, module):
            self.updated, self.names = module.val_acc.update_called, dict(trainer.callback_metrics)

    looks = Looks()
    local_trainer(max_epochs=1, callbacks=looks).fit(Scored(), data(4), data(8))
    assert not looks.updated and looks.names == {}


def test_sums_stay_exact_in_low_precision(local_trainer):
    class Means(Tiny):
        def __init__(self):
            super().__init__()
            self.mean = torchmetrics.MeanMetric()

        def training_step(self, batch, batch_idx):
            self.mean.update(torch.ones(300))
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    module = Means()
    trainer = local_trainer(max_epochs=1, precision="bf16-true")
    trainer.fit(module, data())
    assert module.layer.weight.dtype == torch.bfloat16
    assert {getattr(module.mean, state).dtype for state in module.mean._defaults} == {torch.float32}
    assert trainer.callback_metrics["mean"] == 1.0


def test_mistakes(local_trainer):
    def fit(step, **parts):
        module = Tiny()
        for name, part in parts.items():
            setattr(module, name, part)
        module.training_step = lambda batch: (step(module, batch), module.loss(batch))[1]
        local_trainer(max_epochs=1).fit(module, data(6))

    loose = [BinaryAccuracy()]
    with pytest.raises(MetricError, match="no attribute of the module"):
        fit(lambda m, b: m.log("a", loose[0], on_epoch=True))
    with pytest.raises(MetricError, match=r"call it, as in self.acc\(preds, target\)"):
        fit(lambda m, b: (m.acc.update(*answers(b)), m.log("a", m.acc)), acc=BinaryAccuracy())
    swap = torch.nn.ModuleList([BinaryAccuracy(), BinaryAccuracy()])
    with pytest.raises(MetricError, match="another metric object"):
        fit(lambda m, b: (m.log("a", m.s[0], on_step=False, on_epoch=True), m.s.insert(0, m.s[1])), s=swap)


@pytest.mark.parametrize("sanity", [0, 2])
def test_one_object_in_two_stages_is_refused(sanity, local_trainer):
    class Shared(Tiny):
        def __init__(self):
            super().__init__()
            self.acc = BinaryAccuracy()

        def training_step(self, batch, batch_idx):
            self.acc(*answers(batch))
            self.log("acc", self.acc)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.acc.update(*answers(batch))
            self.log("val_acc", self.acc)

    with pytest.raises(MetricError, match=r"'val_acc', <BinaryAccuracy>.*training logs the same.*one object a stage"):
        local_trainer(max_epochs=2, num_sanity_val_steps=sanity).fit(Shared(), data(8), data(8))
