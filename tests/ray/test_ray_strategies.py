"""ddp2, dp and the settings of strategies over real Ray workers. `tests/strategies` has the many cases, without Ray."""

from __future__ import annotations

import copy
import logging
import os
import signal

import pytest
import torch
from ray_models import Net, assert_close, assert_same, loader, moved
from torch import nn

import raytrainer as rt


class Means(Net):
    """A loss that is a mean over samples."""

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


class Contrast(Means):
    """A loss in which every sample of the batch meets every other one."""

    def training_step(self, batch, batch_idx):
        self.log("rows", float(len(batch[0])), on_step=False, on_epoch=True, reduce_fx="sum")
        return {"z": self(batch[0])}

    def training_step_end(self, outputs):
        loss = (outputs["z"] - outputs["z"].T).square().exp().mean()
        self.log("loss", loss, on_epoch=True)
        self.log("batches", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def validation_step(self, batch, batch_idx):
        return self(batch[0])

    def validation_step_end(self, z):
        self.log("val", (z - z.T).square().mean())
        self.log("val_batches", 1.0, reduce_fx="sum")


@pytest.mark.parametrize("strategy", ["ddp2", rt.DP(bucket_cap_mb=1)], ids=str)
@pytest.mark.parametrize("module", [Contrast, Means])
def test_one_node_is_one_process(strategy, module, one_process, ray_trainer):
    start = module()
    alone, shared = copy.deepcopy(start), copy.deepcopy(start)
    options = {"max_epochs": 2, "seed": 11, "gradient_clip_val": 0.5}
    data = loader(23, 5, shuffle=True), loader(9, 4)  # each ends with a smaller batch; the last has one sample
    one, two = one_process(**options), ray_trainer(strategy=strategy, **options)
    one.fit(alone, *data)
    two.fit(shared, *data)
    assert moved(start, alone)
    assert_close(alone, shared)
    assert one.global_step == two.global_step == 10
    assert two.callback_metrics.keys() == one.callback_metrics.keys()
    for name, value in one.callback_metrics.items():
        if not name.endswith("loss_step") and name != "loss":
            assert float(two.callback_metrics[name]) == pytest.approx(float(value), rel=1e-4), name
    expected, found = one.predict(alone, data[0]), two.predict(shared, data[0])
    assert [len(batch) for batch in found] == [5, 5, 5, 5, 3]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "strategy, line",
    [
        ("ddp", "6 samples a batch x 2 workers x 2 accumulated = 24 samples a step"),
        ("ddp2", "6 samples a batch x 1 node x 2 accumulated = 12 samples a step"),
        ("dp", "6 samples a batch x 1 for the whole job x 2 accumulated = 12 samples a step"),
    ],
)
def test_says_how_many_samples_are_in_a_step(strategy, line, ray_trainer, caplog):
    logging.getLogger("raytrainer").addHandler(caplog.handler)
    try:
        ray_trainer(strategy=strategy, max_steps=1, accumulate_grad_batches=2).fit(Net(), loader(24, 6))
    finally:
        logging.getLogger("raytrainer").removeHandler(caplog.handler)
    assert line in caplog.messages


class Deep(Means):
    """Blocks; rank 1 ends once, where a file says so."""

    def __init__(self, mark=None):
        super().__init__()
        self.mark = mark
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.body(x)

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_rank == 1 and self.current_epoch == 1 and self.mark is not None and self.mark.exists():
            self.mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


def test_shards(ray_trainer, one_process, tmp_path):
    """In shards: the weights of one process, a checkpoint, and a worker that is lost. All else is in strategies/."""
    torch.manual_seed(1)
    start = Deep()
    alone, shared, troubled = (copy.deepcopy(start) for _ in range(3))
    one_process(max_epochs=2).fit(alone, loader(32, 8), loader(9, 4))
    options = {"strategy": "fsdp", "max_epochs": 2, "snapshot_every": 2, "max_failures": 1}
    saver = rt.ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer = ray_trainer(enable_checkpointing=True, callbacks=[saver], **options)
    trainer.fit(shared, loader(32, 4), loader(9, 4))
    assert moved(start, shared)
    assert_close(alone, shared)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    for path in (saver.last_model_path, tmp_path / "end.ckpt"):
        assert_close(shared, Deep.load_from_checkpoint(path))
    assert [len(part) for part in trainer.predict(shared, loader(9, 4))] == [4, 4, 1]
    troubled.mark = tmp_path / "mark"
    troubled.mark.touch()
    ray_trainer(**options).fit(troubled, loader(32, 4), loader(9, 4))
    assert not troubled.mark.exists()
    assert_same(shared, troubled)


def test_compressed_gradients_are_nearly_the_same(ray_trainer):
    plain, compressed = Net(), Net()
    ray_trainer(max_epochs=2, seed=1).fit(plain, loader(32, 4))
    ray_trainer(max_epochs=2, seed=1, strategy=rt.DDP(gradient_compression="fp16")).fit(compressed, loader(32, 4))
    assert moved(plain, compressed)
    assert_close(plain, compressed, atol=0.02)


class Unused(Net):
    """One layer is used in every second batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        found = self(x) + self.extra(x) if batch_idx % 2 else self(x)
        return nn.functional.mse_loss(found, y)


def test_unused_parameters(ray_trainer):
    with pytest.raises(rt.DisagreementError, match=r"extra\.weight.*find_unused_parameters"):
        ray_trainer(max_epochs=1).fit(Unused(), loader(32, 4))
    module = Unused()
    before = module.extra.weight.clone()
    ray_trainer(max_epochs=1, strategy=rt.DDP(find_unused_parameters=True)).fit(module, loader(32, 4))
    assert not torch.equal(module.extra.weight, before)


def test_timeout_and_compile(ray_trainer):
    class Looks(Net):
        def on_train_start(self):
            group = torch.distributed.group.WORLD
            self.found = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
            self.compiled = self.body._compiled_call_impl is not None

    plain, compiled = Net(), Looks()
    ray_trainer(max_epochs=1, seed=2).fit(plain, loader(32, 4))
    strategy = rt.DDP(process_group_timeout=77)
    ray_trainer(max_epochs=1, seed=2, strategy=strategy, compile={"backend": "aot_eager"}).fit(compiled, loader(32, 4))
    assert compiled.found == 77.0 and compiled.compiled
    assert_close(plain, compiled)
