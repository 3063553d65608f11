"""Workers of which one calls what needs all: an error that says where each one waits, rather than a long wait."""

from __future__ import annotations

import pytest
import torch
from torch import distributed

import raytrainer
from raytrainer.driver.workers import standstill_watch
from raytrainer.errors import DisagreementError


class Alone(raytrainer.Module):
    """Rank 1 does something alone in one place."""

    def __init__(self, place: str, does) -> None:
        super().__init__()
        self.place, self.does = place, does
        self.net = torch.nn.Linear(4, 1)
        self.automatic_optimization = place != "manual"

    def alone(self, place, batch_idx=2):
        if (place, self.global_rank, batch_idx) == (self.place, 1, 2):
            return self.does(self)
        return None

    def on_train_start(self):
        self.alone("start")

    def on_train_batch_start(self, batch, batch_idx):
        return self.alone("skip", batch_idx)

    def training_step(self, batch, batch_idx):
        self.alone("step", batch_idx)
        loss = self.net(batch).square().mean()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.alone("manual", batch_idx)
        optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        self.alone("validation", batch_idx)
        self.net(batch)

    def on_train_epoch_end(self):
        self.alone("epoch_end")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def gathers(module):
    module.all_gather(torch.ones(3))


def waits(module):
    distributed.barrier()


def clips(module):
    module.clip_gradients(module.optimizers(), 0.1, "norm")


CASES = {
    "ddp, gathers in a step": ("ddp_cpu", 1, "step", gathers, "in batch 2, at .*gathers, waiting for the collective"),
    "ddp, waits in a hook": ("ddp_cpu", 1, "start", waits, "rank 1: at .*waits, waiting for the collective barrier"),
    "ddp, validation": ("ddp_cpu", 1, "validation", gathers, "rank 0: is through with that"),
    "ddp of hosts, skips": ("ddp_cpu", 2, "skip", lambda module: -1, "rank 1: in batch 2, .* the other workers"),
    "fsdp of hosts, skips": ("fsdp", 2, "skip", lambda module: -1, "rank 1: in batch 2, .* the other workers"),
    "fsdp, epoch's end": ("fsdp", 1, "epoch_end", gathers, "rank 1: at .*gathers, waiting for the collective"),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CASES)
def test_where_each_one_waits_is_told(name, forked, monkeypatch):
    strategy, nodes, place, does, said = CASES[name]
    monkeypatch.setattr(standstill_watch, "_FIRST", 0.2)
    monkeypatch.setattr(standstill_watch, "_EVERY", 0.6)
    trainer = forked(max_epochs=1, strategy=strategy, num_nodes=nodes, num_processes=2 // nodes)
    batches = [torch.ones(2, 4)] * 4
    with pytest.raises(DisagreementError, match=f"(?s)workers wait for each other.*{said}"):
        trainer.fit(Alone(place, does), batches, batches)
    trainer.fit(Alone("nowhere", does), batches, batches)
    assert trainer.state.finished


def test_of_a_model_in_shards_it_is_told_at_once(forked):
    for place, does, said in (("step", gathers, "self.all_gather"), ("manual", clips, "clipping gradients")):
        trainer = forked(max_epochs=1, strategy="fsdp")
        with pytest.raises(DisagreementError, match=f"rank 1 comes to {said}"):
            trainer.fit(Alone(place, does), [torch.ones(2, 4)] * 4)


class LeavesOut(raytrainer.Module):
    """Rank 1 leaves a block out in one batch of an accumulation."""

    def __init__(self, batch) -> None:
        super().__init__()
        self.batch = batch
        self.a, self.b, self.c = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        x = self.a(batch)
        return self.c(x if (self.global_rank, batch_idx) == (1, self.batch) else self.b(x)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


@pytest.mark.sample(1)
@pytest.mark.parametrize("batch", range(1, 6))
def test_another_layer_while_gradients_are_accumulated(batch, forked):
    strategy = raytrainer.FSDP(blocks=["a", "b", "c"])
    trainer = forked(max_epochs=1, strategy=strategy, accumulate_grad_batches=3)
    with pytest.raises(DisagreementError, match=r"rank 1 comes to gathering 'c' after gathering 'a', where .*'b'"):
        trainer.fit(LeavesOut(batch), [torch.ones(2, 4)] * 6)
