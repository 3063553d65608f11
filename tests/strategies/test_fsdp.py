"""Training in shards: the same as one process with the whole batch, whatever the module does."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_models import (
    WIDTH,
    Block,
    Counted,
    Net,
    Stateful,
    assert_equal,
    compare,
    joined,
    loader,
    same_bits,
    table,
    weights,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import raytrainer as rt
from raytrainer.strategies.recomputing import recomputed


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        {"accumulate_grad_batches": 3},
    ],
    ids=str,
)
def test_equals_one_process(options, forked):
    one, two = compare(forked, Net, val=loader(5, 2), **options)
    for ours, theirs in zip(
        two.predict(two._module, loader(7, 2)), one.predict(one._module, loader(7, 2)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "strategy",
    [
        rt.FSDP(blocks=Block),
        rt.FSDP(blocks=["Linear", "LayerNorm"]),
        rt.FSDP(blocks="blocks.*", reshard_after_forward=False),
        rt.FSDP(activation_checkpointing=True),
        rt.FSDP(prefetch=2),
    ],
    ids=str,
)
def test_settings(strategy, forked):
    compare(forked, Net, strategy, val=loader(5, 2), max_epochs=1)


class Damped(Net):
    """Changes the gradients of each batch; those of a window by what they are so far."""

    def on_after_backward(self):
        for parameter in self.parameters():
            parameter.grad.mul_(0.9).sub_(0.1 * parameter.grad.tanh())


@pytest.mark.parametrize("strategy", ["fsdp", rt.FSDP(activation_checkpointing=True, reshard_after_forward=False)])
def test_hooks_see_the_gradients_of_each_batch_of_an_accumulation(strategy, forked):
    compare(forked, Damped, strategy, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=0.1)


class Cache:
    """Grows by what a block computes, as transformers' does."""

    __module__ = "transformers.cache_utils"

    def __init__(self):
        self.seen = []


class Remembers(Block):
    def forward(self, x, memory=None):
        if memory is not None:
            memory.seen.append(x)
            x = torch.stack(memory.seen).sum(0)
        return super().forward(x)


class Remembering(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Remembers() for _ in range(2))

    def forward(self, x):
        x = self.inp(x)
        return self.head(self.blocks[1](self.blocks[0](x, Cache()), memory=Cache()))


def test_what_is_computed_twice_is_in_no_cache(forked):
    compare(forked, Remembering, rt.FSDP(activation_checkpointing=True), max_epochs=1)


class Counts(Block):
    """A pass changes what it multiplies with; and no longer when it is set to evaluate."""

    def __init__(self, saved=True):
        super().__init__()
        self.register_buffer("count", torch.ones(1), persistent=saved)

    def forward(self, x):
        if self.training:
            self.count += 1.0
        return super().forward(x) * self.count.sqrt()


class Counting(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Counts() for _ in range(2))

    def on_train_batch_start(self, batch, batch_idx):
        self.blocks[0].train(batch_idx > 1)


@pytest.mark.parametrize("compiles", [None, {"backend": "eager"}], ids=["eager", "compiled"])
def test_what_is_computed_twice_changes_buffers_once(compiles, forked):
    strategy = rt.FSDP(activation_checkpointing=True)
    _, two = compare(forked, Counting, strategy, max_epochs=1, compile=compiles)
    assert [int(block.count) for block in two._module.blocks] == [3, 5]


class CountsLater(Block):
    """Passes begin to change what they multiply with when some have been, by a write that has a version or has none."""

    def __init__(self, size, way):
        super().__init__()
        self.way, self.passes = way, 0
        self.register_buffer("factors", torch.ones(size))

    def forward(self, x):
        with torch.no_grad():
            if self.passes > 1 and self.way == "written":
                self.factors += 0.5
            elif self.passes > 1 and self.way == "replaced":
                self.factors = self.factors + 0.5
            elif self.passes > 1:
                self.factors.data.add_(0.5)
        return super().forward(x) * self.factors[0].sqrt()


class CountingLater(Net):
    def __init__(self, size, way):
        super().__init__()
        self.blocks = nn.ModuleList(CountsLater(size, way) for _ in range(2))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for block in self.blocks:
            block.passes += 1


@pytest.mark.parametrize(("size", "way"), [(16, "written"), (16, "hidden"), (2**14, "written"), (2**14, "replaced")])
def test_what_is_computed_twice_may_begin_to_change_a_buffer(size, way, forked):
    strategy = rt.FSDP(activation_checkpointing=True)
    _, two = compare(forked, lambda: CountingLater(size, way), strategy, max_epochs=1)
    assert [float(block.factors[0]) for block in two._module.blocks] == [2.0, 2.0]


class Normalises(Block):
    """Writes what it has seen without a version, as batch normalisation does."""

    def __init__(self, saved):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=saved)
        self.register_buffer("variance", torch.ones(WIDTH), persistent=saved)
        self.register_buffer("table", torch.ones(2**14), persistent=saved)

    def forward(self, x):
        return super().forward(F.batch_norm(x, self.mean, self.variance, training=True)) * self.table[0]


def test_what_a_compiler_would_change_twice_is_told_though_it_has_no_version():
    block = Normalises(saved=False)
    passes = recomputed(block, block.forward, {"backend": "eager"})
    passes(torch.randn(4, WIDTH))
    with pytest.raises(rt.ConfigurationError, match="changes buffer 'mean' of Normalises"):
        passes(torch.randn(4, WIDTH))


def test_what_is_computed_twice_sees_a_table_as_it_is_and_not_as_it_was_once():
    block, x = Normalises(saved=True), torch.randn(4, WIDTH)
    passes = recomputed(block, block.forward, None)
    passes(x)
    block.table.data.mul_(-3)  # without a version
    block.eval()
    found = [torch.autograd.grad(do(x).square().sum(), [*block.parameters()]) for do in (block.forward, passes)]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


class CountsAnew(Counting):
    """Two backward passes of one forward pass, which is computed for each of them."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss * 2)
        self.optimizers().step()
        self.optimizers().zero_grad()


def test_what_is_computed_for_each_of_two_backward_passes(forked):
    compare(forked, CountsAnew, rt.FSDP(activation_checkpointing=True), max_epochs=1)


class Fills(Block):
    """Its table has no numbers before the first pass, and too few before others: a second pass changes nothing."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("table", torch.full((size,), torch.nan), persistent=False)
        self.register_buffer("unset", torch.full((2,), torch.nan), persistent=False)

    def forward(self, x):
        if len(x) > len(self.table):
            self.table = torch.arange(len(x), dtype=x.dtype)
        if bool(self.table.isnan().any()):
            self.table.copy_(torch.arange(len(self.table)))
        return super().forward(x) * self.table[: len(x), None].cos()


class Filling(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Fills(2), Fills(8)])


def test_a_compiler_may_recompute_what_makes_its_table(forked):
    trainer = forked(strategy=rt.FSDP(activation_checkpointing=True), max_epochs=1, compile={"backend": "eager"})
    trainer.fit(Filling(), loader(32, 4, torch.float32))


def test_a_compiler_may_recompute_what_changes_no_table(forked):
    class CountsUnsaved(Net):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Counts(saved=False) for _ in range(2))

    trainer = forked(strategy=rt.FSDP(activation_checkpointing=True), max_epochs=1, compile={"backend": "eager"})
    with pytest.raises(rt.ConfigurationError, match=r"changes buffer 'count' of Counts, .* persistent=True"):
        trainer.fit(CountsUnsaved(), loader(32, 4, torch.float32))


def test_four_workers_in_two_copies(forked):
    torch.manual_seed(0)
    alone, shared = Net(), Net()
    shared.load_state_dict(alone.state_dict())
    forked(strategy="local", precision=64, max_epochs=2, gradient_clip_val=0.1).fit(
        alone, loader(64, 16), loader(11, 2)
    )
    strategy = rt.FSDP(replicate="nodes")
    trainer = forked(strategy=strategy, num_nodes=2, precision=64, max_epochs=2, gradient_clip_val=0.1)
    trainer.fit(shared, loader(64, 4), loader(11, 2))
    assert_equal(alone, shared)
    assert float(trainer.callback_metrics["rows"]) == 11


# ---------------------------------------------------------------- what modules do


class Manual(Net):
    """Two steps a batch, the second of which calls parts directly."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        x = self.inp(batch[0])
        for block in self.blocks:
            x = block(x)
        self.manual_backward(F.mse_loss(self.head(x), batch[1]))
        optimizer.step()


class Adversaries(Net):
    """Two optimizers, each of which sees its own parameters only; no part is a block."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.blocks = nn.ModuleList()
        self.maker, self.judge = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        maker, judge = self.optimizers()
        with self.toggled_optimizer(maker):
            maker.zero_grad()
            self.manual_backward(self.judge(self.maker(x)).mean())
            maker.step()
        with self.toggled_optimizer(judge):
            judge.zero_grad()
            self.manual_backward(self.judge(x).mean() - self.judge(self.maker(x).detach()).square().mean())
            judge.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.maker.parameters(), 0.01), torch.optim.Adam(self.judge.parameters(), 0.01)]


class Unfreezes(Net):
    def on_train_epoch_start(self):
        for parameter in (*self.blocks[0].parameters(), *self.inp.parameters()):
            parameter.requires_grad = self.current_epoch >= 1


class CallsEverywhere(Net):
    """Hooks outside of steps call the module, and parts of it."""

    def ones(self):
        return torch.ones(2, 4, dtype=torch.float64, device=self.device)

    def on_fit_start(self):
        self(self.ones())

    def on_train_epoch_end(self):
        with torch.no_grad():
            self.blocks[0](self.inp(self.ones()))

    def on_validation_epoch_end(self):
        self.log("val_end", self.head(self.blocks[1](self.inp(self.ones()))).sum())


class OneBlockTwice(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0], self.blocks[1], self.blocks[0]])


class TiedOutsideOfBlocks(Net):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(5, 1)
        self.other.weight = self.head.weight

    def forward(self, x):
        return super().forward(x) + self.other(self.inp(x))


class ShardsItself(Net):
    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if torch.distributed.is_initialized() and not isinstance(self.blocks[0], FSDPModule):
            fully_shard(self.blocks[0])
            fully_shard(self.blocks[2])


class Foreach(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01, foreach=True)


class Fused(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01, fused=True)


class Adapter(nn.Module):
    """A layer that stays as it is, and what is learned beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Adapters(Net):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        for block in self.blocks:
            block.up = Adapter(block.up)


class PenaltyOnGradients(Net):
    """A backward pass within the step, through which the loss's goes again."""

    def penalised(self, batch):
        x, y = batch
        x = x.clone().requires_grad_(True)
        found = self(x)
        (gradient,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        return F.mse_loss(found, y) + gradient.square().mean()

    def training_step(self, batch, batch_idx):
        return self.penalised(batch)


class ManualPenalty(PenaltyOnGradients):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.penalised(batch))
            optimizer.step()


class AveragesInAHook(Net):
    """What a step may not do."""

    def __init__(self):
        super().__init__()
        self.average = copy.deepcopy(self.inp).requires_grad_(False)

    def forward(self, x):
        return super().forward(x) + self.average(x).sum(1, keepdim=True)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for mean, value in zip(self.average.parameters(), self.inp.parameters(), strict=True):
            mean.data.mul_(0.9).add_(value.data, alpha=0.1)


class StepsWhileGathered(Net):
    """An optimizer steps between the forward pass of another part and its backward pass."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(self.loss(batch))
        loss = F.mse_loss(self.other(batch[0]), batch[1])
        first.step()
        self.manual_backward(loss)
        second.step()
        with torch.no_grad():
            self.log("after", self.loss(batch))

    def configure_optimizers(self):
        most = [*self.inp.parameters(), *self.blocks.parameters(), *self.head.parameters()]
        return [torch.optim.SGD(most, 0.05), torch.optim.SGD(self.other.parameters(), 0.1)]


class StepsFirst(Manual):
    """An optimizer steps within a training step, before the forward pass."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if batch_idx > 0:
            optimizer.step()
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


class Monitors(Net):
    """A hook before the optimizer's step gathers what the step changes."""

    def on_before_optimizer_step(self, optimizer):
        with torch.no_grad():
            self(torch.ones(1, 4, dtype=torch.float64))


class OtherOrder(Net):
    """Parameters that do not lie row by row."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, padding=1)
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        image = self.convolution(x[:, None, None, :].expand(-1, 1, 4, 4))
        return super().forward(x) + (image.mean((2, 3)) + x @ self.turned.t()).sum(1, keepdim=True)


class LogsNorm(Net):
    def on_before_optimizer_step(self, optimizer):
        self.log("norm", nn.utils.get_total_norm([p.grad for p in self.parameters()]))


class HooksGradients(Net):
    def configure_optimizers(self):
        self.head.weight.register_post_accumulate_grad_hook(halve)
        return super().configure_optimizers()


def halve(parameter):
    parameter.grad.mul_(0.5)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "make",
    [
        Manual, Adversaries, Unfreezes, CallsEverywhere, OneBlockTwice, TiedOutsideOfBlocks, ShardsItself, Foreach,
        Fused, PenaltyOnGradients, ManualPenalty, LogsNorm, HooksGradients, AveragesInAHook, StepsWhileGathered,
        OtherOrder, StepsFirst, Monitors,
    ],
)  # fmt: skip
def test_modules(make, forked):
    compare(forked, make, val=loader(5, 2))


class CompilesItself(ShardsItself):
    """Its blocks, hooks and all; what is called for the first time in a step that is looked into."""

    def configure_model(self):
        graphs, self.first = [], 0
        self.graphs = graphs

        def backend(graph, inputs):
            graphs.append(len(inputs))
            return graph.forward

        for block in self.blocks if self.device_mesh is not None else ():
            block.compile(backend=backend, fullgraph=True)
        super().configure_model()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.first = self.first or len(self.graphs)
        assert 0 < len(self.graphs) == self.first


def test_blocks_that_configure_model_compiles(forked):
    forked(max_epochs=1).fit(CompilesItself(), loader(32, 4, torch.float32))


averaging = pytest.mark.parametrize(
    "callback",
    [
        lambda: rt.EMAWeightAveraging(0.8),
        lambda: rt.StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1),
    ],
    ids=["ema", "swa"],
)


@averaging
def test_averages_of_weights_on_one_worker(callback, forked):
    compare(forked, Net, "fsdp", workers=1, val=loader(5, 2), callbacks=lambda: [callback()], max_epochs=3)


@averaging
def test_averages_of_weights(callback, forked, tmp_path):
    second = Net()
    _, two = compare(forked, Net, val=loader(5, 2), callbacks=lambda: [callback()], max_epochs=3)
    two.save_checkpoint(tmp_path / "end.ckpt")
    common = {"precision": 64, "max_epochs": 4}
    forked(callbacks=[callback()], **common).fit(second, loader(32, 4), ckpt_path=tmp_path / "end.ckpt")
    torch.manual_seed(0)
    straight = Net()
    forked(callbacks=[callback()], **common).fit(straight, loader(32, 4))
    assert same_bits(straight, second)


# ---------------------------------------------------------------- workers that have nothing to compute


class Skips(Net):
    """Rank `rank` (-1: each) skips batches 0 and 2 of every epoch, `how`."""

    def __init__(self, how="", rank=0):
        super().__init__()
        self.how, self.rank = how, rank

    def training_step(self, batch, batch_idx):
        skips = self.rank in (self.global_rank, -1) and batch_idx in (0, 2)
        if skips and self.how == "before":
            return None
        loss = self.loss(batch)
        if skips:
            return None if self.how == "after" else torch.zeros((), requires_grad=True)
        return loss


class SkipsAlone(Net):
    """The same in one process: a worker's share of the loss is zero."""

    def __init__(self, rank=0):
        super().__init__()
        self.rank = rank

    def training_step(self, batch, batch_idx):
        parts = [self.loss(half) for half in zip(*(tensor.chunk(2) for tensor in batch), strict=True)]
        skips = [batch_idx in (0, 2) and self.rank in (worker, -1) for worker in range(2)]
        if all(skips):
            return None
        return sum(part * (not skip) for part, skip in zip(parts, skips, strict=True)) / 2


@pytest.mark.sample(3)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rank", [0, 1, -1])
@pytest.mark.parametrize("how", ["before", "after", "a leaf"])
def test_a_worker_may_skip_a_batch(how, rank, accumulate, forked):
    torch.manual_seed(0)
    alone, shared = SkipsAlone(rank), Skips(how, rank)
    shared.load_state_dict(alone.state_dict())
    options = {"precision": 64, "max_epochs": 2, "accumulate_grad_batches": accumulate}
    forked(**options).fit(shared, DataLoader(table(32), batch_size=4))
    forked(strategy="local", **options).fit(alone, joined(32, 4, 2))
    assert_equal(alone, shared)


class DropsBatches:
    """Collates rows, but for batches that `drops(rank, batch)`."""

    def __init__(self, drops):
        self.drops, self.firsts = drops, table(32, torch.float32).tensors[0]

    def __call__(self, rows):
        batch = torch.utils.data.default_collate(rows)
        index = int((self.firsts == batch[0][0]).all(1).nonzero()[0])
        return None if self.drops(index % 2, index // 8) else batch


@pytest.mark.parametrize("make", [Net, Manual])
@pytest.mark.parametrize("drops", [lambda rank, batch: rank == 1 and batch in (0, 2), lambda rank, batch: True])
def test_batches_that_are_none(make, drops, forked):
    """With manual optimization, all workers skip a batch that one has not."""
    torch.manual_seed(0)
    trainer = forked(max_epochs=1)
    trainer.fit(make(), DataLoader(table(32, torch.float32), batch_size=4, collate_fn=DropsBatches(drops)))
    expected = {(Net, False): 4, (Net, True): 4, (Manual, False): 4, (Manual, True): 0}
    assert trainer.global_step == expected[make, drops(0, 1)]


class Drops:
    """Collates rows of `table`, but for these batches of four."""

    def __init__(self, batches):
        self.batches, self.firsts = batches, table(20, torch.float32).tensors[0][::4]

    def __call__(self, rows):
        batch = torch.utils.data.default_collate(rows)
        index = int((self.firsts == batch[0][0]).all(1).nonzero()[0])
        return None if index in self.batches else batch


@pytest.mark.parametrize("batches", [{1}, {0, 1}, {0, 4}, {4}], ids=str)
def test_batches_of_a_validation_that_are_none(batches, forked):
    """On one worker while the other computes, on both, and when the other has none left. Even ones are rank 0's."""
    trainer = forked(max_epochs=1)
    values = DataLoader(table(20, torch.float32), batch_size=4, collate_fn=Drops(batches))
    trainer.fit(Net(), loader(32, 4, torch.float32), values)
    assert float(trainer.callback_metrics["rows"]) == 20 - 4 * len(batches)


def test_adapters(forked):
    torch.manual_seed(0)
    start = Adapters()
    alone, shared = copy.deepcopy(start), copy.deepcopy(start)
    forked(strategy="local", precision=64, max_epochs=2).fit(alone, loader(32, 8))
    forked(precision=64, max_epochs=2).fit(shared, loader(32, 4))
    assert_equal(alone, shared)
    assert torch.equal(start.inp.weight.double(), shared.inp.weight)
    assert not torch.equal(start.blocks[0].up.up.weight.double(), shared.blocks[0].up.up.weight)


def test_a_loss_without_a_graph_is_an_error(forked):
    class Detached(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(batch).detach()

    with pytest.raises(rt.ConfigurationError, match="without a graph"):
        forked(max_epochs=1).fit(Detached(), loader(32, 4, torch.float32))


class OtherModelPerLoader(Net):
    """What is gathered for a batch depends on its loader."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        found = self(x) if dataloader_idx == 0 else self.head(self.blocks[2](self.inp(x)))
        self.log("val", F.mse_loss(found, y))
        self.log("rows", float(len(x)), reduce_fx="sum")


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "loaders",
    [
        [loader(13, 2), loader(3, 2), loader(9, 2)],
        [loader(1, 2), loader(5, 2)],
        [DataLoader(Counted(7), batch_size=2), loader(2, 2)],
    ],
    ids=["uneven", "one batch", "unknown"],
)
@pytest.mark.parametrize("interval", [1.0, 3])
def test_uneven_validation(loaders, interval, forked):
    compare(forked, OtherModelPerLoader, val=loaders, max_epochs=1, val_check_interval=interval, num_sanity_val_steps=1)


# ---------------------------------------------------------------- precisions


@pytest.mark.sample(3)
@pytest.mark.parametrize("make", [Net, Stateful])
@pytest.mark.parametrize("precision, dtype", [("bf16-mixed", torch.float32), ("16-mixed", torch.float32),
                                              ("bf16-true", torch.bfloat16), (32, torch.float32)])  # fmt: skip
def test_precisions(precision, dtype, make, forked):
    class Looks(make):
        def training_step(self, batch, batch_idx):
            self.seen = [str(x.dtype) for x in (self.inp(batch[0]), self.scale, batch[0])]
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module = Looks()
    trainer = forked(precision=precision, max_epochs=2, gradient_clip_val=1.0)
    trainer.fit(module, loader(32, 4, torch.float32), loader(12, 4, torch.float32))
    assert {value.dtype for value in weights(module).values() if value.is_floating_point()} == {dtype}
    half = {"bf16-mixed": "torch.bfloat16", "16-mixed": "torch.float16"}.get(precision, str(dtype))
    assert module.seen == [half, str(dtype), str(dtype)]
    reference = forked(strategy="local", precision=32, max_epochs=2, gradient_clip_val=1.0)
    torch.manual_seed(0)
    reference.fit(make(), loader(32, 8, torch.float32), loader(12, 4, torch.float32))
    assert float(trainer.callback_metrics["val"]) == pytest.approx(float(reference.callback_metrics["val"]), rel=0.5)


def test_an_infinity_on_one_worker_skips_the_step_on_all(forked):
    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            # one parameter's gradient, which is one worker's shard
            spoilt = self.head.bias.sum() * float("inf") if batch_idx == 1 and self.global_rank == 1 else 0.0
            return self.loss(batch) + spoilt

    module = Overflows()
    trainer = forked(precision="16-mixed", max_epochs=1)
    trainer.fit(module, loader(32, 4, torch.float32))
    assert all(value.isfinite().all() for value in weights(module).values())
    assert trainer.global_step == 4 and trainer.skipped_steps >= 1


# ---------------------------------------------------------------- what is refused, what is said


def test_tied_across_blocks_is_refused(forked):
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.blocks[1].up = self.blocks[0].up

    with pytest.raises(rt.ConfigurationError, match=r"'blocks\.0\.up\.weight' and 'blocks\.1\.up\.weight' are one"):
        forked(max_epochs=1).fit(Tied(), loader(32, 4, torch.float32))


def test_a_line_says_what_was_sharded(forked, caplog):
    logging.getLogger("raytrainer").addHandler(caplog.handler)
    try:
        forked(max_epochs=1).fit(Net(), loader(32, 4, torch.float32))
    finally:
        logging.getLogger("raytrainer").removeHandler(caplog.handler)
    assert "fsdp: 406 parameters in 2 shards, 0.0 MiB of them on each worker; 3 blocks (Block)" in caplog.messages


class KeepsWhole(Net):
    """Looks whether what it was sent is still there while it trains in shards."""

    def configure_model(self):
        self.sent = [weakref.ref(parameter) for parameter in self.parameters()]

    def on_train_batch_start(self, batch, batch_idx):
        gc.collect()
        kept = [tuple(parameter.shape) for ref in self.sent if (parameter := ref()) is not None]
        assert not kept, f"the whole is still there beside the shards: {kept}"
        self.sent = []


def test_nobody_keeps_the_whole(forked):
    forked(strategy="fsdp", max_epochs=1).fit(KeepsWhole(), loader(8, 2, torch.float32))


def test_compiled_by_block(forked):
    torch.manual_seed(0)
    plain = Net()
    compiled = copy.deepcopy(plain)
    forked(max_epochs=1).fit(plain, loader(32, 4, torch.float32))
    forked(max_epochs=1, compile={"backend": "eager"}).fit(compiled, loader(32, 4, torch.float32))
    assert_equal(plain, compiled, atol=1e-6)


def test_one_worker(forked):
    compare(forked, Net, rt.FSDP(), workers=1, val=loader(5, 2), max_epochs=1)


def test_the_guides_examples(forked, tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "examples" / "guide" / "sharded-models.md"
    blocks = [part.split("```")[0] for part in page.read_text().split("```python\n")[1:]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rt, "Trainer", forked)
    found: dict[str, Any] = {"__name__": "__main__"}
    for code in blocks:
        if "transformers" in code or "peft" in code:  # test_transformers.py runs these
            continue
        exec(compile(code, str(page), "exec"), found)
    assert all(parameter.is_meta for parameter in found["module"].parameters())
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert all(parameter.isfinite().all() for parameter in found["whole"].parameters())
