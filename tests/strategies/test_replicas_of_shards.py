"""What several workers hold of a model in shards is compared as an epoch ends: copies, whole parts, buffers, steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import raytrainer
from raytrainer import FSDP, ModelParallel
from raytrainer.errors import DisagreementError

COPIES = FSDP(replicate=2)
SPLIT = ModelParallel(tensor=2)


class Net(raytrainer.Module):
    """One worker, the last one, changes something on its own after the backward pass."""

    def __init__(self, changes=None) -> None:
        super().__init__()
        self.changes = changes
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 2)
        self.factor = nn.Parameter(torch.ones(1))  # whole on one worker of a copy
        self.register_buffer("scale", torch.ones(3))

    def configure_model(self):
        mesh = self.device_mesh
        if mesh is not None and "tensor_parallel" in mesh.mesh_dim_names and mesh["tensor_parallel"].size() > 1:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(self, mesh["tensor_parallel"], plan)

    def training_step(self, batch, batch_idx):
        return self.factor * self.down(self.up(self.norm(batch)).relu()).square().mean()

    def on_before_optimizer_step(self, optimizer):
        if self.changes is not None and self.global_rank == self.trainer.world_size - 1:
            self.changes(self, optimizer)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gradient_of(name):
    def change(module, optimizer):
        local(module.get_parameter(name).grad).mul_(-3.0)

    return change


def all_gradients(module, optimizer):
    """Also of a factor of which two of the four workers hold nothing."""
    for parameter in module.parameters():
        local(parameter.grad).mul_(-3.0)


def weight(module, optimizer):
    with torch.no_grad():
        local(module.up.weight).add_(0.1)


def buffer(module, optimizer):
    module.scale += 1


def steps(module, optimizer):
    for state in optimizer.state.values():
        state["step"] += 1


def decay(module, optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.5


#: Strategy, workers, what one changes, what is said of it. A shard that nobody else has is that worker's own.
CASES = {
    "gradient of a copy": (COPIES, 4, gradient_of("up.weight"), r"\[3\] have another up.weight than the first rank"),
    "some have no rows": (COPIES, 4, all_gradients, r"\[\d\] have another .* and \d more tensors"),
    "weight of a copy": (COPIES, 4, weight, r"\[3\] have another up.weight than the first rank with"),
    "gradient of what is whole": (SPLIT, 2, gradient_of("norm.weight"), r"\[1\] have another norm.weight than rank 0"),
    "buffer": (FSDP(), 2, buffer, r"rank\(s\) \[1\] have another scale than rank 0"),
    "steps": (FSDP(), 2, steps, r"have another number of steps of AdamW, group 0: \(3.0,\), where rank 0 has \(2.0,\)"),
    "weight decay": (FSDP(), 2, decay, r"have another weight_decay of AdamW"),
}  # fmt: skip


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CASES)
def test_what_differs_is_told(name, forked):
    strategy, workers, changes, said = CASES[name]
    with pytest.raises(DisagreementError, match=f"after epoch 0 .*{said}"):
        forked(max_epochs=1, strategy=strategy, num_processes=workers).fit(Net(changes), [torch.randn(2, 4)] * 2)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("strategy", "workers"), [(COPIES, 4), (SPLIT, 2), (FSDP(), 2)])
def test_what_is_the_same_is_not(strategy, workers, forked):
    trainer = forked(max_epochs=2, strategy=strategy, num_processes=workers)
    trainer.fit(Net(), [torch.randn(2, 4) for _ in range(3)])
    assert trainer.state.finished


def test_nobody_looks_where_it_is_off(forked):
    trainer = forked(max_epochs=1, strategy=FSDP(check_replicas=False))
    trainer.fit(Net(buffer), [torch.randn(2, 4)] * 2)
    assert trainer.state.finished
