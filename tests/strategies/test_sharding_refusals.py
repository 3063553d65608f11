"""What fsdp cannot do: told before training, or as soon as it shows, rather than a wrong result or a wait for ever."""

from __future__ import annotations

import copy

import pytest
import torch
from sharded_models import Net, loader
from torch import nn

import raytrainer as rt


class LeavesOutBackward(Net):
    """Rank 1 does not call `manual_backward` in batch `at`."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        if self.global_rank == 0 or batch_idx != self.at:
            self.manual_backward(loss)
        optimizer.step()


class ReturnsEarly(LeavesOutBackward):
    def training_step(self, batch, batch_idx):
        return None if self.global_rank == 1 and batch_idx == self.at else super().training_step(batch, batch_idx)


class LosesItsGraph(LeavesOutBackward):
    """Rank 1 has a loss without parameters in batch `at`."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        apart = self.global_rank == 1 and batch_idx == self.at
        self.manual_backward(torch.zeros((), requires_grad=True) if apart else self.loss(batch))
        optimizer.step()


class FreezesInBetween(Net):
    """Rank 1 freezes a block in batch `at`."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_rank == 1 and batch_idx == self.at:
            self.blocks[1].requires_grad_(False)


class DropsLayers(Net):
    """In batch `at` each rank leaves out another block: as many gatherings, of the same size."""

    def training_step(self, batch, batch_idx):
        self.drops = batch_idx == self.at
        return super().training_step(batch, batch_idx)

    def forward(self, x):
        x = self.inp(x)
        for index, block in enumerate(self.blocks):
            x = x if self.drops and index == self.global_rank else block(x)
        return self.head(x)


class StopsEarly(Net):
    """Rank 1 leaves out the last block: what it does is a beginning of what the other does."""

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks[: 2 if self.global_rank == 1 else 3]:
            x = block(x)
        return self.head(x)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "make, at",
    [
        (LeavesOutBackward, 0), (LeavesOutBackward, 2), (ReturnsEarly, 0), (ReturnsEarly, 3), (DropsLayers, 0),
        (DropsLayers, 2), (StopsEarly, 0), (LosesItsGraph, 2), (FreezesInBetween, 2),
    ],
)  # fmt: skip
def test_workers_that_do_different_things(make, at, forked):
    module = make()
    module.at = at
    trainer = forked(max_epochs=1, strategy="fsdp")
    with pytest.raises(rt.DisagreementError, match=r"different things in one training step: rank \d comes to "):
        trainer.fit(module, loader(32, 4, torch.float32))


class StepsAlone(LeavesOutBackward):
    """Rank 1 leaves out the optimizer's step of batch 2."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        if self.global_rank == 0 or batch_idx != 2:
            optimizer.step()


@pytest.mark.parametrize("strategy", ["fsdp", "ddp", "dp"])
def test_workers_that_step_apart(strategy, forked):
    trainer = forked(max_epochs=1, strategy=strategy)
    # after how many batches depends on how long they take
    with pytest.raises(rt.DisagreementError, match=r"optimizer steps by batch .*rank\(s\) 0: \d; rank\(s\) 1: \d\."):
        trainer.fit(StepsAlone(), loader(32, 4, torch.float32))


class EvaluatesApart(Net):
    """Leaves out another block on each rank, or is through with fewer, when it validates."""

    def __init__(self, fewer):
        super().__init__()
        self.fewer = fewer

    def validation_step(self, batch, batch_idx):
        x = self.inp(batch[0])
        for index, block in enumerate(self.blocks):
            if batch_idx < 1 or (index < 2 + self.global_rank if self.fewer else index != self.global_rank):
                x = block(x)
        self.log("val", self.head(x).mean())


@pytest.mark.sample(2)
@pytest.mark.parametrize("fewer", [False, True])
@pytest.mark.parametrize("rows", [8, 16])
def test_workers_that_evaluate_in_different_ways(rows, fewer, forked):
    """Whether they have done the same before, or not."""
    trainer = forked(strategy="fsdp")
    with pytest.raises(rt.DisagreementError, match=r"in one evaluation step: rank \d comes to .* equally often"):
        trainer.validate(EvaluatesApart(fewer), loader(rows, 2, torch.float32))


class Alternates(Net):
    """What a step does depends on the batch, on all workers alike."""

    def forward(self, x):
        x = self.inp(x)
        for index, block in enumerate(self.blocks):
            x = x if index == self.skipped else block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        self.skipped = (batch_idx * 2) % 5
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.skipped = 0
        super().validation_step(batch, batch_idx)


def test_what_steps_do_may_change_on_all_workers_alike(forked):
    from sharded_models import compare

    class Last(Alternates):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx % 3)

    compare(forked, Last, max_epochs=3)


def with_part(part):
    class Has(Net):
        def __init__(self):
            super().__init__()
            self.extra = part()

    return Has


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(1.0))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.ones(3, dtype=torch.complex64))


class HooksInConfigureModel(Net):
    def configure_model(self):
        self.head.weight.register_hook(lambda gradient: gradient * 0)


class HooksInConfigureOptimizers(Net):
    def configure_optimizers(self):
        self.blocks[0].up.weight.register_hook(lambda gradient: gradient * 0)
        return super().configure_optimizers()


class Penalty(Net):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) + sum(parameter.square().sum() for parameter in self.parameters())


def with_optimizer(kind):
    class Has(Net):
        def configure_optimizers(self):
            return kind([parameter for parameter in self.parameters() if parameter.ndim == 2])

    return Has


class Momentum(Net):
    """An average of a part's weights, which begins with them, so that the first one changes nothing."""

    def __init__(self):
        super().__init__()
        self.average = copy.deepcopy(self.inp).requires_grad_(False)

    def step_average(self):
        for mean, value in zip(self.average.parameters(), self.inp.parameters(), strict=True):
            mean.data.mul_(0.9).add_(value.data, alpha=0.1)

    def training_step(self, batch, batch_idx):
        self.step_average()
        return self.loss(batch)


class MomentumAnew(Momentum):
    def step_average(self):
        for mean, value in zip(self.average.parameters(), self.inp.parameters(), strict=True):
            mean.data = 0.9 * mean.data + 0.1 * value.data


class ClipsByHand(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.head.weight.data.clamp_(-0.01, 0.01)
        self.manual_backward(self.loss(batch))


class BeforeBackward(Net):
    def on_before_zero_grad(self, optimizer):
        self.head.weight.data.mul_(0.9)


class BeforeStep(Net):
    """Its weights are gathered again, by a forward pass, when it limits them."""

    def on_before_optimizer_step(self, optimizer):
        with torch.no_grad():
            self(torch.ones(1, 4))
        self.head.weight.data.mul_(0.9)


class InBlock(Net):
    """A block limits its own weights."""

    def __init__(self):
        super().__init__()
        self.blocks[1].register_forward_pre_hook(limit)


def limit(block, args):
    block.up.weight.data.clamp_(-0.1, 0.1)


class InValidation(Net):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.head.weight.mul_(0.9)


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    "make, message",
    [
        (InBlock, r"the forward pass of 'blocks\.1' has changed 'blocks\.1\.up\.weight'.* on_train_batch_end"),
        (InValidation, r"an evaluation's step, or a hook around it, has changed 'head\.weight'\."),
        (BeforeStep, r"training_step, or a hook before the optimizer's, has changed 'head\.weight'\."),
        (BeforeBackward, r"a hook before the backward pass, has changed 'head\.weight'\."),
        (
            Momentum,
            r"step, or a hook.*, has changed 'average\.weight'.* on_train_batch_end",
        ),
        (MomentumAnew, r"training_step, or a hook.*, has changed 'average\.weight'"),
        (ClipsByHand, r"training_step has changed 'head\.weight'\."),
        (with_part(lambda: nn.Embedding(3, 3, max_norm=1.0)), r"'extra' change their weights in the forward pass"),
        (with_optimizer(torch.optim.LBFGS), "LBFGS with fsdp: it joins all"),
        (with_optimizer(torch.optim.Adafactor), "Adafactor with fsdp"),
        (with_optimizer(torch.optim.Rprop), "Rprop with fsdp"),
        (with_part(Scalar), r"'extra\.value' have no dimension"),
        (with_part(lambda: nn.Linear(0, 3)), r"'extra\.weight' have no elements"),
        (with_part(lambda: nn.LazyLinear(3)), r"'extra\.weight', 'extra\.bias' have no shape yet"),
        (with_part(lambda: nn.Embedding(3, 3, sparse=True)), r"'extra' give sparse gradients"),
        (with_part(Complex), r"several types .*'inp\.weight' \(float32\), 'extra\.value' \(complex64\)"),
        (HooksInConfigureModel, r"register_hook was called on 'head\.weight'"),
        (HooksInConfigureOptimizers, r"register_hook was called on 'blocks\.0\.up\.weight'"),
        (Penalty, r"computed its loss from parameters in shards"),
    ],
)
def test_refused(make, message, forked):
    with pytest.raises(rt.ConfigurationError, match=message):
        forked(max_epochs=1).fit(make(), loader(32, 4, torch.float32), loader(4, 2, torch.float32))


class PartOfABlock(Net):
    def forward(self, x):
        return self.head(self.blocks[0].down(self.blocks[1].up(self.inp(x))))


def test_a_part_of_a_block_is_explained(forked):
    with pytest.raises(RuntimeError) as caught:
        forked(max_epochs=1).fit(PartOfABlock(), loader(32, 4, torch.float32))
    assert any("Call the block rather than a part of it" in note for note in caught.value.__notes__)


def test_logging_a_part_of_a_number_is_refused(forked):
    class Logs(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("sum", self.head.weight.sum())

    with pytest.raises(rt.MetricError, match=r"log its full_tensor\(\)"):
        forked(max_epochs=1).fit(Logs(), loader(32, 4, torch.float32))


class ShardsApart(Net):
    """Its `configure_model` calls `fully_shard`, on itself or with less than all workers."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        mesh, block = self.device_mesh["data_parallel"], self.blocks[0]
        if self.how == "itself":
            fully_shard(self, mesh=mesh)
        else:
            fully_shard(block, mesh=mesh, ignored_params={block.norm.bias} if self.how == "ignored" else None)


@pytest.mark.parametrize(
    "how, strategy, message",
    [
        ("itself", rt.FSDP(), r"calls fully_shard on ShardsApart itself: leave that out"),
        ("all", rt.FSDP(activation_checkpointing=True), r"\(activation_checkpointing=True\): .* do nothing: have"),
        ("all", rt.FSDP(reshard_after_forward=False), r"\(reshard_after_forward=False\): .*: give it to fully_shard"),
        ("ignored", rt.FSDP(), r"'blocks\.0\.norm\.bias' are in no shards .* each of 2 workers would train its own"),
        ("a copy", rt.FSDP(replicate=2), r'averaged over 2 of 4 workers.*device_mesh\["replicate", "data_par'),
    ],
    ids=["itself", "recomputed", "kept", "ignored", "a copy"],
)  # fmt: skip
def test_what_fully_shard_in_configure_model_would_leave_undone_is_refused(how, strategy, message, forked):
    trainer = forked(strategy=strategy, num_processes=4 if strategy.replicate else 2, max_epochs=1)
    with pytest.raises(rt.ConfigurationError, match=message):
        trainer.fit(ShardsApart(how), loader(32, 4, torch.float32))
