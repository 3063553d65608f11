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
