"""precision="float8" over several workers: beside torchao by hand on `fully_shard`, and from strategy to strategy."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raytrainer as rt

torchao = pytest.importorskip("torchao.float8")  # here, so that workers need not import it
ROWS, BATCH, EPOCHS = 32, 4, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(rt.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 1)
        self.losses: list[float] = []
        self.start = {name: value.clone() for name, value in self.state_dict().items()}

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.mse_loss(self(x).float(), y)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", F.mse_loss(self(batch[0]).float(), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


class BesideIt(Net):
    """Trains a second time, by hand, when it has been trained."""

    def on_train_end(self):
        rank, size = self.global_rank, self.trainer.world_size
        model = Net()
        model.load_state_dict(self.start)
        config = torchao.Float8LinearConfig(emulate=True)
        torchao.convert_to_float8_training(model, module_filter_fn=lambda _, name: name != "head", config=config)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=dataclasses.replace(policy, cast_forward_inputs=False))
        optimizer, losses = model.configure_optimizers(), []
        for _ in range(EPOCHS):
            for x, y in zip(*(part[rank::size].split(BATCH) for part in data().dataset.tensors), strict=True):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.mse_loss(model(x).float(), y)
                losses.append(float(loss.detach()))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert losses == self.losses and losses[-1] < losses[0]
        for (name, theirs), ours in zip(model.named_parameters(), self.parameters(), strict=True):
            assert torch.equal(theirs.to_local(), ours.to_local()), name


def data(rows: int = ROWS) -> DataLoader:
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=BATCH)


def test_equals_a_loop_by_hand(forked, caplog):
    module = BesideIt()
    with caplog.at_level(logging.INFO):
        forked(max_epochs=EPOCHS, precision="float8").fit(module, data(), data(10))
    assert "fsdp: " in caplog.text and "float8: 4 of 5 linear layers, without head (the last)" in caplog.text
    assert {type(part) for part in module.modules() if isinstance(part, nn.Linear)} == {nn.Linear}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "ddp"},
        # in process in tests/worker/test_float8.py; other modules over workers in test_fsdp.py
        pytest.param({"compile": {"backend": "aot_eager"}}, marks=pytest.mark.sample(0)),
        {"strategy": rt.FSDP(activation_checkpointing=True)},
    ],
    ids=str,
)
def test_resembles_bf16_and_goes_on_elsewhere(options, forked, tmp_path):
    torch.manual_seed(3)
    start, losses = Net(), {}
    for precision in ("float8", "bf16"):
        module = copy.deepcopy(start)
        trainer = forked(max_epochs=3, precision=precision, **options)
        trainer.fit(module, data(), data(10))
        assert {type(part) for part in module.modules() if isinstance(part, nn.Linear)} == {nn.Linear}
        losses[precision] = module.losses
        trainer.save_checkpoint(tmp_path / precision)
    assert losses["float8"] != losses["bf16"]
    assert losses["float8"] == pytest.approx(losses["bf16"], abs=0.05 * losses["bf16"][0])
    state = Net.load_from_checkpoint(tmp_path / "float8").state_dict()
    assert {type(value) for value in state.values()} == {torch.Tensor} and list(state) == list(start.state_dict())
    for path, there in (("float8", {"precision": 32, "strategy": "local"}), ("bf16", {"precision": "float8"})):
        again = copy.deepcopy(start)
        forked(max_epochs=4, **there).fit(again, data(), ckpt_path=tmp_path / path)
        assert again.losses[0] < losses["float8"][0]
