"""Several workers end after the same batch where one of them is asked to stop: on one host and on two."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import raytrainer
from raytrainer.errors import DisagreementError
from raytrainer.strategies import skipping


class Asked(raytrainer.Module):
    """Some ranks are asked in their fourth batch; all note how many batches they have had."""

    def __init__(self, who):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.who, self.batches, self.counts = who, 0, []

    def training_step(self, batch, batch_idx):
        self.batches += 1
        if self.global_rank in self.who and self.batches == 4:
            self.trainer.should_stop = True
        return self.layer(batch[0] if isinstance(batch, list) else batch).square().mean()

    def on_train_end(self):
        self.counts = self.all_gather(torch.tensor(self.batches)).tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stream(IterableDataset):
    """Of unknown length; keeps its place itself, so that its state is taken before the batch that is read ahead."""

    def __init__(self):
        self.read = 0

    def __iter__(self):
        while self.read < 4000:
            self.read += 1
            yield torch.ones(4)

    def state_dict(self):
        return {"read": self.read}

    def load_state_dict(self, state):
        self.read = state["read"]


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "accumulating", "stream", "manual"])
@pytest.mark.parametrize("who", [(1,), (0, 1)])
def test_all_workers_stop_after_the_same_batch(who, kind, nodes, forked):
    module = Asked(who)
    options = {"strategy": "fsdp" if kind == "fsdp" else "ddp", "num_nodes": nodes, "num_processes": 2 // nodes}
    if kind == "accumulating":
        options["accumulate_grad_batches"] = 3
    if kind == "manual":
        module = Manual(who)
    data = TensorDataset(torch.ones(4000, 4))
    loader = DataLoader(Stream(), batch_size=2) if kind == "stream" else DataLoader(data, batch_size=2)
    trainer = forked(max_epochs=1, min_epochs=0, **options)
    trainer.fit(module, loader)
    assert trainer.should_stop
    assert module.counts[0] == module.counts[1]
    assert 4 <= module.counts[0] < 1000
    if nodes == 1 and kind in ("ddp", "fsdp"):  # the other one is in the next batch at most
        assert module.counts[0] <= 7
    again = Asked(())  # the same workers, which are not to remember
    forked(max_epochs=1, limit_train_batches=9, **options | {"accumulate_grad_batches": 1}).fit(again, loader)
    assert again.counts == [9, 9]


class Manual(Asked):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        self.optimizers().step()
        self.optimizers().zero_grad()


class Skips(Asked):
    """Some ranks skip the rest of an epoch from its fourth batch on."""

    def __init__(self, skipping):
        super().__init__(())
        self.skipping = skipping

    def setup(self, stage):
        self.patience = skipping._PATIENCE_UNSEEN
        if len(self.skipping) == 1:  # which waits in vain
            skipping._PATIENCE_UNSEEN = 0.1

    def teardown(self, stage):
        skipping._PATIENCE_UNSEEN = self.patience

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.global_rank in self.skipping and batch_idx == 3 else None


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_skip_the_rest_of_an_epoch(strategy, nodes, forked):
    module = Skips((0, 1))
    options = {"strategy": strategy, "num_nodes": nodes, "num_processes": 2 // nodes, "max_epochs": 2}
    forked(**options).fit(module, DataLoader(TensorDataset(torch.randn(40, 4)), 2))
    assert module.counts == [6, 6]


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_that_skips_alone_is_told(accumulate, strategy, nodes, forked):
    options = {"strategy": strategy, "num_nodes": nodes, "num_processes": 2 // nodes, "max_epochs": 1}
    others = r"rank\(s\) \[0\]" if nodes == 1 else "the others within 0.1 s"
    with pytest.raises(DisagreementError, match=rf"returned -1 in batch 3 on rank\(s\) \[1\], and not on {others}: "):
        forked(accumulate_grad_batches=accumulate, **options).fit(
            Skips((1,)), DataLoader(TensorDataset(torch.randn(40, 4)), 2)
        )
