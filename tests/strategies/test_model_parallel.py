"""Layers split over workers, and shards of them over others: the same as one process with the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
from sharded_models import Block, Net, Stateful, assert_equal, joined, loader, same_bits, table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import raytrainer as rt


def split_blocks(module, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in module.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


class Split(Net):
    """Its blocks' hidden layers are split."""

    def configure_model(self):
        if self.device_mesh is not None:
            split_blocks(self, self.device_mesh["tensor_parallel"])

    def reset_parameters(self):
        self.scale.fill_(1.0)


class Logged(Split):
    """Says which data it sees."""

    def training_step(self, batch, batch_idx):
        self.log("rows", float(len(batch[0])), reduce_fx="sum", on_epoch=True, on_step=False)
        return super().training_step(batch, batch_idx)


LAYOUTS = [(2, 1, None), (2, 2, None), (1, 2, 2)]


def fit_both(forked, make, layout, val=None, **options):
    tensor, data, replicate = layout
    parts = data * (replicate or 1)
    torch.manual_seed(0)
    start = make()
    alone, shared = copy.deepcopy(start), copy.deepcopy(start)
    common = {"precision": 64, "max_epochs": 2, **options}
    one = forked(strategy="local", **common)
    one.fit(alone, joined(32, 8 // parts, parts), val)
    strategy = rt.ModelParallel(tensor=tensor, data=data, replicate=replicate)
    two = forked(strategy=strategy, num_processes=tensor * parts, **common)
    two.fit(shared, loader(32, 8 // parts), val)
    assert_equal(alone, shared)
    assert not torch.equal(start.head.weight, shared.head.weight)
    assert one.global_step == two.global_step > 0
    return one, two


@pytest.mark.sample(2)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.05, "accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
def test_equals_one_process(layout, options, forked):
    one, two = fit_both(forked, Logged, layout, val=loader(9, 2), **options)
    assert two.callback_metrics.keys() == one.callback_metrics.keys()
    for name in ("rows", "val"):
        torch.testing.assert_close(two.callback_metrics[name], one.callback_metrics[name])
    for ours, theirs in zip(
        two.predict(two._module, loader(7, 2)), one.predict(one._module, loader(7, 2)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_metric_that_a_hook_asks_for_its_value_counts_each_part_of_the_data_once(forked):
    """Also with averages of weights, which hooks of a validation put in and take out."""
    torchmetrics = pytest.importorskip("torchmetrics")

    class Asked(Split):
        def __init__(self):
            super().__init__()
            self.seen = torchmetrics.CatMetric()

        def validation_step(self, batch, batch_idx):
            self.seen.update(self(batch[0]).detach())

        def on_validation_epoch_end(self):
            self.log("val", self.seen.compute().sum())
            self.seen.reset()

    for layout in ((2, 1, None), (2, 2, None)):
        one, two = fit_both(forked, Asked, layout, val=loader(9, 2), callbacks=[rt.EMAWeightAveraging(0.5)])
        torch.testing.assert_close(two.callback_metrics["val"], one.callback_metrics["val"])


def test_anomalies_are_looked_for_in_split_layers(forked):
    class Spoils(Split):
        def training_step(self, batch, batch_idx):
            spoilt = (self.head.bias.sum() * 0).sqrt() * 0 if batch_idx == 2 else 0.0
            return super().training_step(batch, batch_idx) + spoilt

    trainer = forked(strategy=rt.ModelParallel(tensor=2), detect_anomaly=True, max_epochs=1)
    with pytest.raises(RuntimeError, match="SqrtBackward0' returned nan"):
        trainer.fit(Spoils(), loader(16, 4, torch.float32))


@pytest.mark.sample(1)
@pytest.mark.parametrize("layout", [(2, 2, None), (1, 2, 2)], ids=str)
def test_resuming_is_equal_bit_by_bit(layout, forked, tmp_path):
    """Also in the middle of an accumulation, with statistics and dropout of each worker's own."""

    class SplitStateful(Stateful):
        configure_model = Split.configure_model

    torch.manual_seed(0)
    start = SplitStateful()
    tensor, data, replicate = layout
    strategy, parts = rt.ModelParallel(tensor=tensor, data=data, replicate=replicate), data * (replicate or 1)
    common = {
        "strategy": strategy, "num_processes": 4, "seed": 3, "enable_checkpointing": True, "max_epochs": 2,
        "accumulate_grad_batches": 2, "val_check_interval": 3,
    }  # fmt: skip
    found = []
    for path in (None, "epoch=0-step=1.ckpt"):
        module = copy.deepcopy(start)
        saver = rt.ModelCheckpoint(tmp_path / str(path), save_top_k=-1)
        resume = path and tmp_path / "None" / path
        if resume:
            assert resume.exists(), list((tmp_path / "None").iterdir())
        data = loader(20 * parts, 4, torch.float32), loader(12, 4, torch.float32)
        forked(callbacks=[saver], **common).fit(module, *data, ckpt_path=resume)
        found.append(module)
    assert same_bits(*found)


def test_any_layout_goes_on_with_anothers_checkpoint(forked, tmp_path):
    torch.manual_seed(0)
    start = Split()
    alone = copy.deepcopy(start)
    steps = [
        (rt.ModelParallel(tensor=2, data=2), 4), (rt.ModelParallel(tensor=1, data=2), 2), ("local", 1),
        (rt.ModelParallel(tensor=2), 2), ("fsdp", 2), (rt.ModelParallel(tensor=1, data=2, replicate=2), 4),
    ]  # fmt: skip
    forked(strategy="local", precision=64, max_epochs=len(steps)).fit(alone, loader(32, 8))
    path = None
    for epoch, (strategy, workers) in enumerate(steps):
        module = copy.deepcopy(start)
        trainer = forked(
            strategy=strategy, num_processes=workers, precision=64, max_epochs=epoch + 1, enable_checkpointing=True,
            callbacks=[rt.ModelCheckpoint(tmp_path / str(epoch), save_last=True)],
        )  # fmt: skip
        parts = {2: 1, 3: 1, 5: 4}.get(epoch, 2)
        trainer.fit(module, loader(32, 8 // parts), ckpt_path=path)
        path = tmp_path / str(epoch) / "last.ckpt"
        assert_equal(module, Split.load_from_checkpoint(path), atol=1e-6)  # in this process, without a group
    assert_equal(alone, module)


@pytest.mark.sample(1)
@pytest.mark.parametrize("precision", [32, "bf16-mixed", "bf16-true"])
def test_made_in_the_workers(precision, forked, tmp_path):
    """Weights are the same in any layout."""

    class Still(Split):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    found = []
    for strategy, workers in (("fsdp", 1), (rt.ModelParallel(tensor=2), 2), (rt.ModelParallel(tensor=2, data=2), 4)):
        folder = tmp_path / str(len(found))
        saver = rt.ModelCheckpoint(folder, save_last=True)
        trainer = forked(
            strategy=strategy, num_processes=workers, seed=5, max_epochs=1, enable_checkpointing=True,
            callbacks=[saver], precision=precision,
        )  # fmt: skip
        module = rt.on_meta(Still)
        trainer.fit(module, loader(16, 4, torch.float32), loader(6, 2, torch.float32))
        found.append(Still.load_from_checkpoint(folder / "last.ckpt"))
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


class Tied(Split):
    """Its last layer is its first, transposed; both are split."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.inp, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.inp.weight = self.head.weight
        self.blocks = nn.ModuleList()

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        if self.how == "built here":
            self.inp, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.inp.weight = self.head.weight
        if self.how == "without a head":
            self.head.register_parameter("weight", None)
        if self.how == "untied":
            self.inp.weight = nn.Parameter(self.inp.weight.detach().clone())
        if self.device_mesh is None:
            return
        if self.how == "sharded":
            fully_shard(self.inp, mesh=self.device_mesh["data_parallel"])
            return
        plan = {name: ColwiseParallel(output_layouts=Replicate()) for name in ("inp", "head")}
        if self.how in ("one of them", "without a head"):
            del plan["inp" if self.how == "one of them" else "head"]
        parallelize_module(self, self.device_mesh["tensor_parallel"], plan)
        if self.how == "tied again":
            self.inp.weight = self.head.weight

    def forward(self, x):
        x = torch.tanh(self.inp(x))
        return x if self.how == "without a head" else self.head(x)

    def loss(self, batch):
        return F.mse_loss(self(batch[0]), batch[1].expand(-1, 4))


@pytest.mark.parametrize("how", ["sent", "built here", "one of them", "sharded"])
def test_tied_parameters_that_are_split_each_for_itself_are_refused(how, forked):
    layout = {"tensor": 1, "data": 2} if how == "sharded" else {"tensor": 2}
    trainer = forked(strategy=rt.ModelParallel(**layout), max_epochs=1)
    message = r"split 'inp\.weight', 'head\.weight', which are one .*: self\.head\.weight = self\.inp\.weight"
    with pytest.raises(rt.ConfigurationError, match=message if how != "built here" else "split 'head.weight', 'inp"):
        trainer.fit(Tied(how), loader(16, 4, torch.float32))


def test_tied_parameters_that_are_split_and_tied_again(forked):
    _, two = fit_both(forked, lambda: Tied("tied again"), (2, 1, None))
    assert two._module.inp.weight is two._module.head.weight
    fit_both(forked, lambda: Tied("untied"), (2, 1, None))
    trainer = forked(strategy=rt.ModelParallel(tensor=2), max_epochs=1)
    trainer.fit(Tied("without a head"), loader(16, 4, torch.float32))


class Whole(Net):
    """Shards its blocks itself, splits the loss over classes, and clips by hand."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 6)
        self.automatic_optimization = False

    def configure_model(self):
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        split_blocks(self, self.device_mesh["tensor_parallel"])
        plan = {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
        parallelize_module(self, self.device_mesh["tensor_parallel"], plan)
        for block in self.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        from torch.distributed.tensor.parallel import loss_parallel

        optimizer = self.optimizers()
        x, y = batch
        with loss_parallel():
            loss = F.cross_entropy(self(x), (y[:, 0].abs() * 5).long() % 6)
            optimizer.zero_grad()
            self.manual_backward(loss)
        self.clip_gradients(optimizer, 0.1)
        optimizer.step()
        self.log("loss", loss, on_epoch=True)


def test_a_module_that_does_it_all_itself(forked):
    one, two = fit_both(forked, Whole, (2, 2, None))
    torch.testing.assert_close(two.callback_metrics["loss_epoch"], one.callback_metrics["loss_epoch"])


@pytest.mark.sample(1)
@pytest.mark.parametrize("layout", [(2, 2, None), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("loads", [True, False])
def test_what_configure_model_builds_is_rank_0s(layout, loads, forked):
    """Layers made in the workers, and weights that rank 0 alone has read."""

    class Builds(Split):
        def configure_model(self):
            self.inp = nn.Linear(4, 5)
            if loads:
                torch.nn.init.constant_(self.head.weight, 1.0 if self.global_rank == 0 else 2.0)
            super().configure_model()

    fit_both(forked, Builds, layout, seed=1)


class ByRank(IterableDataset):
    """Deals itself out by the rank, or by the part of the data."""

    def __init__(self, by_part):
        self.by_part = by_part

    def __iter__(self):
        index, count = rt.data_part() if self.by_part else (rt.rank(), rt.world_size())
        yield from (row for at, row in enumerate(table(64, torch.float32)) if at % count == index)


@pytest.mark.parametrize("by_part", [True, False])
def test_workers_that_split_layers_must_read_the_same(by_part, forked):
    trainer = forked(strategy=rt.ModelParallel(tensor=2), max_epochs=1)
    loader = DataLoader(ByRank(by_part), batch_size=4)
    if by_part:
        trainer.fit(Logged(), loader)
        assert float(trainer.callback_metrics["rows"]) == 64
    else:
        with pytest.raises(rt.DataError, match="ranks 0 and 1 are to compute each batch of the train loader together"):
            trainer.fit(Logged(), loader)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.inp, self.head = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class AsInLightning(rt.Module):
    """Written for Lightning's ModelParallelStrategy: all is made on the meta device, split and sharded in one hook."""

    def configure_model(self):
        if hasattr(self, "net"):
            return
        if self.device_mesh is None:
            self.net = Plain()
            return
        from torch.distributed.fsdp import fully_shard

        with torch.device("meta"):
            self.net = Plain()
        split_blocks(self.net, self.device_mesh["tensor_parallel"])
        for block in self.net.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


def test_a_module_written_for_lightning(forked, tmp_path):
    found = []
    for layout in ((1, 2), (2, 1), (2, 2)):
        folder = tmp_path / str(layout)
        saver = rt.ModelCheckpoint(folder, save_last=True)
        tensor, data = layout
        trainer = forked(
            strategy=rt.ModelParallel(tensor=tensor, data=data), num_processes=tensor * data, seed=5, max_epochs=2,
            precision=64, enable_checkpointing=True, callbacks=[saver],
        )  # fmt: skip
        trainer.fit(AsInLightning(), loader(32, 8 // data))
        found.append(AsInLightning.load_from_checkpoint(folder / "last.ckpt"))
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])
