"""Buffers of rank 0 for everybody, however they lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from raytrainer import DDP, Module

KINDS = {
    "plain": lambda: torch.zeros(2, 3),
    "every second": lambda: torch.zeros(2, 6)[:, ::2],
    "transposed": lambda: torch.zeros(3, 2).t(),
    "expanded": lambda: torch.zeros(2, 1).expand(2, 3),
    "part of another": lambda: torch.zeros(4, 5)[1:3, 1:4],
}


class Marks(Module):
    """Each worker's buffer says its rank; validation reports what it says then, and what lies between its numbers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = torch.nn.Linear(2, 1)

    def on_fit_start(self) -> None:
        self.register_buffer("mark", KINDS[self.kind](), persistent=False)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        rank = float(self.trainer.global_rank)
        self.memory = torch.as_strided(self.mark, (self.mark.untyped_storage().nbytes() // 4,), (1,), 0)
        self.memory.fill_(-1.0 - rank)
        narrowed = self.mark[:, :1] if self.kind == "expanded" else self.mark
        narrowed.copy_(torch.arange(narrowed.numel()).reshape(narrowed.shape) + 100 * rank)
        self.between = self.memory[self.memory < 0].clone()

    def validation_step(self, batch, batch_idx):
        rows = torch.arange(2.0)[:, None].expand(2, 3)
        expected = rows if self.kind == "expanded" else torch.arange(6.0).reshape(2, 3)
        self.log("right", float(torch.equal(self.mark, expected)), reduce_fx="min")
        self.log("spared", float(torch.equal(self.memory[self.memory < 0], self.between)), reduce_fx="min")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# torch's DDP itself refuses expanded buffers
@pytest.mark.parametrize(
    "strategy, kind", [(s, k) for s in ("ddp", "fsdp") for k in KINDS if (s, k) != ("ddp", "expanded")]
)
def test_rank_0s_in_any_layout(strategy, kind, forked):
    loader = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=1)
    trainer = forked(strategy=strategy, max_epochs=1, check_val_every_n_epoch=1, num_sanity_val_steps=0)
    trainer.fit(Marks(kind), loader, loader)
    assert [float(trainer.callback_metrics[name]) for name in ("right", "spared")] == [1.0, 1.0]


class Own(Module):
    """A buffer that nobody broadcasts, which each worker's batches change."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before
        self.layer = torch.nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros(()))

    def on_train_epoch_start(self) -> None:
        if not self.before:
            self.log("began", self.seen, reduce_fx="max")

    def training_step(self, batch, batch_idx):
        self.seen += 1 + 10 * self.trainer.global_rank
        return self.layer(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_worker_has_its_own(forked, tmp_path):
    """And not those of rank 0, as where they are broadcast."""
    loader = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=1)
    options = {"strategy": DDP(broadcast_buffers=False), "limit_val_batches": 0}
    first = forked(max_epochs=1, **options)
    first.fit(Own(before=True), loader)
    first.save_checkpoint(tmp_path / "first.ckpt")
    second = forked(max_epochs=2, **options)
    second.fit(Own(before=False), loader, ckpt_path=tmp_path / "first.ckpt")
    assert float(second.callback_metrics["began"]) == 4 * 11


class Makes(Module):
    """Training makes, changes and drops buffers, of the module and of a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.rows = torch.nn.Embedding(3, 2)
        for persistent in (False, True):
            kind = "kept" if persistent else "own"
            for part in (self, self.layer):
                for name in ("same", "grown", "cast", "dropped"):
                    part.register_buffer(f"{kind}_{name}", torch.zeros(2), persistent)
                part.register_buffer(f"{kind}_later", None, persistent)

    def setup(self, stage: str) -> None:
        self.rows.num_embeddings, self.rows.weight = 5, torch.nn.Parameter(torch.ones(5, 2))

    def training_step(self, batch, batch_idx):
        for part in (self, self.layer):
            for kind in ("own", "kept"):
                getattr(part, f"{kind}_same").add_(1)
                setattr(part, f"{kind}_grown", torch.ones(3))
                setattr(part, f"{kind}_cast", torch.ones(2, dtype=torch.int64))
                setattr(part, f"{kind}_dropped", None)
                setattr(part, f"{kind}_later", torch.full((4,), 4.0))
                if f"{kind}_new" not in part._buffers:
                    part.register_buffer(f"{kind}_new", torch.ones(1), persistent=kind == "kept")
        return self.layer(batch[0]).mean() + self.rows(torch.arange(5)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_training_makes_of_buffers_comes_home(strategy, forked):
    loader = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=1)
    found = {}
    for chosen in ("local", strategy):
        module = Makes()
        trainer = forked(strategy=chosen, max_epochs=1, limit_train_batches=2)
        trainer.fit(module, loader)
        assert trainer.global_step == 2
        found[chosen] = {
            f"{path}.{name}": (value if value is None else value.tolist(), name in part._non_persistent_buffers_set)
            for path, part in module.named_modules()
            for name, value in part._buffers.items()
        }
        module.load_state_dict(module.state_dict())
        assert module.rows.weight.shape == (5, 2)
    assert found[strategy] == found["local"] and len(found["local"]) == 24
