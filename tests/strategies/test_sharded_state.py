"""What is saved of a module in shards, and who may go on from it."""

from __future__ import annotations

import copy
import json
import os
import re
import signal

import pytest
import torch
from sharded_models import Net, Stateful, assert_equal, loader, same_bits

import raytrainer as rt
from raytrainer.checkpointing import piece_files
from raytrainer.checkpointing.checkpoint_format import write_checkpoint
from raytrainer.checkpointing.part_file import write_part
from raytrainer.checkpointing.pieces import KEY, Mark
from raytrainer.worker.training_loop import TrainingLoop
from raytrainer.worker.worker_state import capture_state, most_of_state


def saver(folder, **options):
    return rt.ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **options)


class Damped(Stateful):
    """Changes the gradients of each batch."""

    def on_after_backward(self):
        for parameter in self.parameters():
            parameter.grad.mul_(0.9).sub_(0.1 * parameter.grad.tanh())


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", [Stateful, Damped])
@pytest.mark.parametrize(
    "options, saving",
    [
        ({}, {"every_n_train_steps": 3}),
        ({"accumulate_grad_batches": 2, "val_check_interval": 3}, {}),  # in the middle of an accumulation
        ({"precision": "16-mixed"}, {"every_n_train_steps": 3}),
        ({"precision": "bf16-mixed", "accumulate_grad_batches": 2, "val_check_interval": 3}, {}),
    ],
    ids=str,
)
def test_resuming_in_mid_epoch_is_equal_bit_by_bit(options, saving, kind, forked, tmp_path):
    torch.manual_seed(0)
    start = kind()
    common = {"seed": 3, "enable_checkpointing": True, "max_epochs": 2, **options}
    data = loader(40, 4, torch.float32), loader(12, 4, torch.float32)
    whole = copy.deepcopy(start)
    average = [rt.EMAWeightAveraging(0.9)] if not options else []
    forked(callbacks=[saver(tmp_path / "first", **saving), *average], **common).fit(whole, *data)
    names = sorted(os.listdir(tmp_path / "first"))
    assert len(names) >= 2
    for name in names[:3]:
        resumed = copy.deepcopy(start)
        again = [rt.EMAWeightAveraging(0.9)] if not options else []
        trainer = forked(callbacks=[saver(tmp_path / "second", **saving), *again], **common)
        trainer.fit(resumed, *data, ckpt_path=tmp_path / "first" / name)
        assert same_bits(whole, resumed), name


@pytest.mark.parametrize("averages", [False, True])
def test_memory_is_taken_for_all_that_a_capture_has(averages, forked, monkeypatch):
    """So that the first capture, for which training waits, need not take other memory in its place."""
    train = TrainingLoop.train

    def looked_at(loop, *args):
        report = train(loop, *args)
        if report.step > 1:
            expected, found = most_of_state(loop.run, True), capture_state(loop.run, False, True)
            assert expected[KEY].keys() == found[KEY].keys()
        return report

    monkeypatch.setattr(TrainingLoop, "train", looked_at)
    callbacks = [rt.EMAWeightAveraging(0.9)] if averages else []
    forked(seed=3, max_epochs=1, callbacks=callbacks).fit(Stateful(), loader(40, 4, torch.float32))


class Dies(Stateful):
    """Rank 1 ends in the second epoch, once."""

    def __init__(self, mark=None):
        super().__init__()
        self.mark = mark

    def on_train_batch_start(self, batch, batch_idx):
        here = self.global_rank == 1 and self.current_epoch == 1 and batch_idx == 3
        if here and self.mark is not None and os.path.exists(self.mark):
            os.remove(self.mark)
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_changes_no_bit(forked, tmp_path):
    torch.manual_seed(0)
    start = Dies()
    calm, troubled = copy.deepcopy(start), copy.deepcopy(start)
    options = {"seed": 3, "max_epochs": 2, "snapshot_every": 2, "max_failures": 1}
    forked(**options).fit(calm, loader(40, 4, torch.float32))
    mark = tmp_path / "mark"
    mark.touch()
    troubled.mark = str(mark)
    trainer = forked(**options)
    trainer.fit(troubled, loader(40, 4, torch.float32))
    assert not mark.exists() and trainer.global_step == 10
    assert same_bits(calm, troubled)


def test_any_number_of_workers_in_any_strategy_goes_on(forked, tmp_path):
    torch.manual_seed(0)
    start = Net()
    alone = copy.deepcopy(start)
    forked(strategy="local", precision=64, max_epochs=5).fit(alone, loader(32, 8))
    path = None
    for epoch, (strategy, workers) in enumerate(
        [(rt.FSDP(), 4), ("fsdp", 2), ("ddp", 2), ("local", 1), (rt.FSDP(replicate=2), 4)]
    ):
        folder = tmp_path / str(epoch)
        module = copy.deepcopy(start)
        trainer = forked(
            strategy=strategy, num_processes=workers, precision=64, max_epochs=epoch + 1, enable_checkpointing=True,
            callbacks=[rt.ModelCheckpoint(folder, save_last=True)],
        )  # fmt: skip
        trainer.fit(module, loader(32, 8 // workers), ckpt_path=path)
        path = folder / "last.ckpt"
        plain = Net.load_from_checkpoint(path)  # in this process, without a group
        assert_equal(module, plain, atol=1e-6)
        assert trainer.validate(module, loader(13, 2), ckpt_path=path)
    assert_equal(alone, module)


@pytest.fixture
def saved(forked, tmp_path):
    """A checkpoint in shards, and the module that it is of."""
    torch.manual_seed(0)
    module = Net()
    trainer = forked(max_epochs=1, enable_checkpointing=True, callbacks=[rt.ModelCheckpoint(tmp_path, save_last=True)])
    trainer.fit(module, loader(32, 4, torch.float32))
    return module, tmp_path / "last.ckpt"


def test_files(saved):
    """Each worker's tensors are in a safetensors file of its own, which others can read."""
    module, path = saved
    files = sorted(re.sub("-[0-9a-f]{12}", "", file.name) for file in path.iterdir())
    assert files == ["meta.json", "pieces.json", "rank0.safetensors", "rank1.safetensors", "state.pt"]
    meta = json.loads((path / "meta.json").read_text())
    assert set(meta["files"]) == {file.name for file in path.iterdir()} - {"meta.json"}
    safetensors = pytest.importorskip("safetensors.torch")
    parts = [safetensors.load_file(file) for file in sorted(path.glob("rank*"))]
    rows = [part["state_dict/blocks.0.up.weight"] for part in parts]
    assert torch.equal(torch.cat(rows), module.blocks[0].up.weight)
    assert "state_dict/inp.weight" in parts[0]


@pytest.mark.sample(3)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("pattern", ["rank1-*", "pieces-*", "state-*"])
def test_damage_is_told_with_the_file(damage, pattern, saved, forked):
    _, path = saved
    file = next(path.glob(pattern))
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) - len(data) // 4] ^= 1
        file.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    with pytest.raises(rt.CheckpointError, match=file.name):
        Net.load_from_checkpoint(path)
    with pytest.raises(rt.CheckpointError, match=file.name):
        forked(max_epochs=2).fit(Net(), loader(32, 4, torch.float32), ckpt_path=path)


def test_what_is_half_written_is_deleted(tmp_path, monkeypatch):
    held = [{"x": {"at": (i, 0), "shape": (1, 4), "data": torch.ones(1, 4)}} for i in range(2)]
    state = {"state_dict": {"x": Mark("x", (2, 4), torch.float32)}, KEY: held}

    def full(folder, plan, *rest):
        if plan.name.startswith("rank1"):
            raise rt.CheckpointError("the disk is full")
        return write_part(folder, plan, *rest)

    monkeypatch.setattr(piece_files, "write_part", full)
    with pytest.raises(rt.CheckpointError, match="the disk is full"):
        write_checkpoint(tmp_path / "a.ckpt", state)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_shape_are_refused(forked, tmp_path):
    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(5, 2)

    trainer = forked(max_epochs=1, enable_checkpointing=True, callbacks=[rt.ModelCheckpoint(tmp_path, save_last=True)])
    trainer.fit(Net(), loader(32, 4, torch.float32))
    with pytest.raises(rt.CheckpointError, match=r"head\.weight: \(1, 5\) in the checkpoint, \(2, 5\) here"):
        forked(max_epochs=2).fit(Wider(), loader(32, 4, torch.float32), ckpt_path=tmp_path / "last.ckpt")
