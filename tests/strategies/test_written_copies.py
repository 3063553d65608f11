"""Hooks and steps that write into a part of a weight in shards: a view of it does so, a copy is an error."""

from __future__ import annotations

import pytest
import torch
from sharded_models import Net, compare, loader
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

import raytrainer as rt


def zero_first_row(weight):
    weight.data[0].zero_()


def scale_third(weight):
    weight.detach().chunk(3)[1].mul_(0.5)


def set_row(weight):
    with torch.no_grad():
        weight[1] = weight[2]


def fill_end(weight):
    with torch.no_grad():
        nn.init.constant_(weight[-3:], 1.0)


def zero_own_average(weight):
    average = weight.detach().clone()  # a variable still has it
    average[0].zero_()


def zero_rows_gradient(weight):
    weight.grad[1:3].zero_()


def in_hook(name, write, part="inp"):
    class Writes(Net):
        pass

    def hook(self, *args):
        write(self.get_submodule(part).weight)
        return super(Writes, self).configure_optimizers() if name == "configure_optimizers" else None

    setattr(Writes, name, hook)
    return Writes


class OnGradients(Net):
    """As the guide says where `register_hook` is refused."""

    def configure_optimizers(self):
        self.head.weight.register_post_accumulate_grad_hook(lambda weight: weight.grad.mul_(0.5))
        self.inp.weight.register_post_accumulate_grad_hook(zero_rows_gradient)
        return super().configure_optimizers()


class InCallback(rt.WorkerCallback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        zero_first_row(module.blocks[0].up.weight)


class InStep(Net):
    """To a block's part, which is in shards outside of the block's forward pass."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:  # one that is looked into
            set_row(self.blocks[1].up.weight)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            in_hook("on_train_batch_end", zero_first_row),
            r"on_train_batch_end writes \(zero_\) to a part of 'inp\.weight'",
        ),
        (
            in_hook("on_train_batch_end", zero_own_average),
            r"on_train_batch_end writes \(zero_\) to a part of a tensor in shards",
        ),
        (in_hook("on_fit_start", scale_third), r"on_fit_start writes \(mul_\) to a part of 'inp\.weight'"),
        (
            in_hook("configure_optimizers", fill_end),
            r"configure_optimizers writes \(fill_\) to a part of 'inp\.weight'",
        ),
        (
            in_hook("on_before_optimizer_step", zero_rows_gradient, "blocks.2.up"),
            r"_step writes \(zero_\) to a part of 'blocks\.2\.up\.weight\.grad'",
        ),
        (OnGradients, r"A hook of 'inp\.weight' writes \(zero_\) to a part of 'inp\.weight\.grad'"),
        (InStep, r"training_step writes \(copy_\) to a part of 'blocks\.1\.up\.weight'"),
    ],
    ids=["hook", "average", "chunk", "optimizers", "gradients", "gradients_hook", "step"],
)
def test_refused(make, message, forked):
    with pytest.raises(rt.ConfigurationError, match=message):
        forked(max_epochs=1, strategy="fsdp").fit(make(), loader(32, 4, torch.float32))


def test_refused_in_a_compiled_step(forked):
    """Whose blocks are compiled all the same."""

    class Compiled(InStep):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert torch._dynamo.utils.counters["frames"]["ok"] > 0

    trainer = forked(max_epochs=1, compile={"backend": "eager"})
    with pytest.raises(rt.ConfigurationError, match=r"training_step writes \(copy_\) to a part of 'blocks\.1\.up"):
        trainer.fit(Compiled(), loader(32, 4, torch.float32))


def test_refused_in_a_callback(forked):
    with pytest.raises(
        rt.ConfigurationError, match=r"(?s)writes \(zero_\) to a part of 'blocks\.0\.up\.weight'.*full_tensor"
    ):
        forked(max_epochs=1, strategy="fsdp", callbacks=[InCallback()]).fit(Net(), loader(32, 4, torch.float32))


class Writes(Net):
    """All that reaches the weight, with what the error says to do among it."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            weight = self.inp.weight
            weight[:, 1].mul_(0.5)
            weight.T[0].zero_()
            weight.data.clamp_(-0.3, 0.3)
            weight[0].clone().zero_()
            weight.sub_(weight[2] * 0.1)
            weight.masked_fill_(weight > 0.25, 0.2)
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            whole[3] = 0.125
            whole[:2].add_(0.01)
            if isinstance(weight, DTensor):
                weight.copy_(distribute_tensor(whole, weight.device_mesh, weight.placements))
            self.log("first", weight[0].sum().full_tensor() if isinstance(weight, DTensor) else weight[0].sum())


def test_what_reaches_the_weight_is_the_same_as_in_one_process(forked):
    one, two = compare(forked, Writes)
    torch.testing.assert_close(two.callback_metrics["first"], one.callback_metrics["first"])


def test_of_a_layer_that_is_split(forked):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class Split(Net):
        def configure_model(self):
            for block in self.blocks:
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, self.device_mesh["tensor_parallel"], plan)
            with torch.no_grad():
                self.blocks[0].down.weight[0].zero_()  # split along the other dimension
                self.blocks[0].up.weight.chunk(2)[1].zero_()

    strategy = rt.ModelParallel(tensor=2, data=1)
    with pytest.raises(
        rt.ConfigurationError, match=r"configure_model writes \(zero_\) to a part of 'blocks\.0\.up\.weight'"
    ):
        forked(max_epochs=1, strategy=strategy, num_processes=2).fit(Split(), loader(32, 4, torch.float32))


class UsesCopies(Net):
    """What is in no weight, and nowhere else once it is written to."""

    def training_step(self, batch, batch_idx):
        weight = self.blocks[1].up.weight
        twice = weight * 2.0
        first = twice[:2]
        first.mul_(0.5)  # as an activation in place
        del twice
        return super().training_step(batch, batch_idx) + 0.0 * whole_of(first.sum())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            row = self.inp.weight.clone()[0]
            row.div_(row.norm())
            self.log("row", whole_of(row.sum()))


def whole_of(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_copies_of_what_nobody_else_has(forked):
    one, two = compare(forked, UsesCopies)
    torch.testing.assert_close(two.callback_metrics["row"], one.callback_metrics["row"])
