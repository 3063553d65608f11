"""Workers that build, freeze or cast something else than each other are told, whatever they do next."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from raytrainer import Module
from raytrainer.errors import DisagreementError

WAYS = {
    "frozen": lambda net: net.layer.bias.requires_grad_(False),
    "all frozen": lambda net: net.requires_grad_(False),
    "larger": lambda net: setattr(net, "layer", torch.nn.Linear(3, 1)),
    "cast": lambda net: net.layer.to(torch.float64),
    "more": lambda net: setattr(net, "more", torch.nn.Linear(2, 1)),
    "buffer": lambda net: net.register_buffer("table", torch.zeros(3)),
    "order": lambda net: net._modules.update(layer=net._modules.pop("layer")),
}
TOLD = {
    "frozen": r"layer.bias is of shape \(1,\) in float32 on rank\(s\) \[0\], frozen, of shape \(1,\)",
    "all frozen": r"layer.weight is .* on rank\(s\) \[0\], frozen, ",
    "larger": r"layer.weight is of shape \(1, 2\) in float32 on rank\(s\) \[0\], of shape \(1, 3\) in float32 on",
    "cast": r"in float32 on rank\(s\) \[0\], of shape \(1, 2\) in float64 on rank\(s\) \[1\]",
    "more": r"more.weight is absent on rank\(s\) \[0\]",
    "buffer": r"table is absent on rank\(s\) \[0\], of shape \(3,\)",
    "order": "the same parameters in another order",
}


class Own(Module):
    def __init__(self, way: str, manual: bool) -> None:
        super().__init__()
        self.way, self.automatic_optimization = way, not manual
        self.layer, self.other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)

    def setup(self, stage: str) -> None:
        if self.global_rank == 1:
            WAYS[self.way](self)

    def training_step(self, batch, batch_idx):
        raise AssertionError("it has begun")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("way", WAYS)
def test_all_are_told(way, manual, forked):
    trainer = forked(strategy="ddp", max_epochs=1)
    with pytest.raises(DisagreementError, match=TOLD[way]):
        trainer.fit(Own(way, manual), DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=1))


class Later(Own):
    """Changes on one rank only, in a hook of the second epoch."""

    def __init__(self, way: str, manual: bool, hook: str, rank: int) -> None:
        super().__init__(way, manual)
        self.hook, self.rank = hook, rank

    def setup(self, stage: str) -> None:
        pass

    def _change(self, hook: str) -> None:
        if (hook, self.global_rank, self.current_epoch) == (self.hook, self.rank, 1):
            WAYS[self.way](self)

    def on_train_epoch_start(self) -> None:
        self._change("on_train_epoch_start")

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        self._change("on_train_batch_end")

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch[0]) + self.other(batch[0])).square().sum()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return loss


@pytest.mark.sample(8)
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "dp"])
@pytest.mark.parametrize(
    ("way", "told"),
    [("frozen", "layer.bias is frozen"), ("all frozen", "layer.weight is frozen, "), ("more", "more.weight is new, ")],
)
def test_what_only_one_workers_hook_switches(way, told, strategy, manual, forked):
    trainer = forked(strategy=strategy, max_epochs=3)
    match = rf"epoch 1 begins .* on rank\(s\) \[0\] nothing has changed; on rank\(s\) \[1\] {told}"
    with pytest.raises(DisagreementError, match=match):
        trainer.fit(Later(way, manual, "on_train_epoch_start", 1), DataLoader(TensorDataset(torch.ones(4, 2)), 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_only_one_worker_adds_in_the_middle_of_an_epoch(rank, forked):
    trainer = forked(strategy="ddp", max_epochs=3)
    module = Later("more", False, "on_train_batch_end", rank)
    with pytest.raises(DisagreementError, match=rf"(after epoch 1 only rank\(s\) \[{rank}\] have|epoch 2 begins .*) "):
        trainer.fit(module, DataLoader(TensorDataset(torch.ones(4, 2))))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_all_workers_hooks_switch(strategy, forked):
    class Alike(Later):
        def _change(self, hook: str) -> None:
            if hook == "on_train_epoch_start":
                self.layer.bias.requires_grad_(self.current_epoch != 1)

    module = Alike("frozen", False, "", 0)
    forked(strategy=strategy, max_epochs=3).fit(module, DataLoader(TensorDataset(torch.ones(4, 2))))
    assert module.layer.bias.requires_grad
