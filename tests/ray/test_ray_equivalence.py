"""DDP over two workers with half the batch each is one process with the whole batch, to float tolerance."""

from __future__ import annotations

import copy

import pytest
import torch
from ray_models import Net, assert_close, assert_same, loader, moved, table
from torch import nn
from torch.utils.data import DataLoader

import raytrainer as rt
from raytrainer import Module


def both(
    one_process, ray_trainer, module: Module, samples: int = 48, batch_size: int = 8, **options
) -> tuple[Module, Module]:
    """The same module after one process with the whole batch, and after two workers with half of it."""
    alone, shared = copy.deepcopy(module), copy.deepcopy(module)
    options = {"max_epochs": 3, "seed": 11, **options}
    one = one_process(**options)
    one.fit(alone, loader(samples, batch_size, shuffle=True))
    two = ray_trainer(**options)
    two.fit(shared, loader(samples, batch_size // 2, shuffle=True))
    assert one.global_step == two.global_step > 0
    assert two.callback_metrics["loss_epoch"] == pytest.approx(float(one.callback_metrics["loss_epoch"]), rel=1e-4)
    assert moved(module, alone)
    return alone, shared


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 4},  # 6 batches an epoch: the last step is of two
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 4},
        {"max_steps": 8, "max_epochs": None},
        {"precision": 64},
    ],
    ids=str,
)
def test_half_the_batch_each(options, one_process, ray_trainer):
    assert_close(*both(one_process, ray_trainer, Net(), **options))


def test_clipping_has_an_effect(one_process, ray_trainer):
    """Lest the cases above compare runs that clip nothing."""
    assert moved(
        both(one_process, ray_trainer, Net())[1], both(one_process, ray_trainer, Net(), gradient_clip_val=0.1)[1]
    )


def test_a_last_batch_that_is_smaller(one_process, ray_trainer):
    assert_close(*both(one_process, ray_trainer, Net(), samples=44))


class Manual(Net):
    """Two optimizers, stepped by hand, one of them every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        loss = nn.functional.mse_loss(self(x), y)
        first.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(first, 0.5)
        first.step()
        self.untoggle_optimizer(first)
        loss = nn.functional.l1_loss(self(x), y)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            second.step()
            second.zero_grad()
        self.log("loss", loss, on_epoch=True)

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.body[0].parameters(), lr=0.05),
            torch.optim.Adam(self.body[3].parameters(), lr=0.02),
        ]


def test_manual_optimization(one_process, ray_trainer):
    assert_close(*both(one_process, ray_trainer, Manual()), atol=1e-5)


def test_gathering_is_differentiable(one_process, ray_trainer):
    """An in-batch loss over all workers' samples has the gradients of one process."""

    class Contrast(Net):
        def training_step(self, batch, batch_idx):
            z = self(batch[0])
            z = self.all_gather(z, sync_grads=True).flatten(0, 1)
            # every worker has the loss of the whole batch: DDP's mean over workers is its gradient
            loss = (z - z.T).square().exp().mean() * self.trainer.world_size
            self.log("loss", loss / self.trainer.world_size, on_epoch=True)
            return loss / self.trainer.world_size

    assert_close(*both(one_process, ray_trainer, Contrast(), max_epochs=2), atol=1e-5)


def test_all_gather_of_containers(ray_trainer):
    class Gathers(Net):
        def on_train_start(self):
            rank = self.global_rank
            found = self.all_gather({"rank": torch.tensor([rank, -rank]), "number": rank + 0.5, "name": "text"})
            self.found = found
            # the gradient of each worker's own part comes back, summed over the workers
            own = torch.tensor([1.0 + rank], requires_grad=True)
            (self.all_gather(own, sync_grads=True).sum() * (rank + 1)).backward()
            self.gradient = own.grad

    module = Gathers()
    ray_trainer(max_epochs=1, limit_train_batches=1).fit(module, loader(16, 4))
    assert module.found["rank"].tolist() == [[0, 0], [1, -1]]
    assert module.found["number"].tolist() == [0.5, 1.5] and module.found["name"] == "text"
    assert module.gradient.tolist() == [3.0]


def test_a_rank_that_skips_takes_part_with_zero_gradients(ray_trainer):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            if self.global_rank == 1 and batch_idx % 2:
                return None
            return super().training_step(batch, batch_idx)

    class Zeroes(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (0.0 if self.global_rank == 1 and batch_idx % 2 else 1.0)

    one, other = Skips(), Zeroes()
    for module in (one, other):
        trainer = ray_trainer(max_epochs=2, seed=2)
        trainer.fit(module, loader(32, 4))
        assert trainer.global_step == 8
    assert moved(Net(), one)
    assert_close(one, other)


class Drifts(Net):
    """What rank 1 does to its own weights, and nobody else."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_rank == 1 and batch_idx == 1:
            with torch.no_grad():
                self.body[3].weight.add_(0.5)


class Normalised(Net):
    """Running statistics differ between workers, as they should."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return super().forward(self.norm(x))


def test_workers_that_drift_apart_are_told(ray_trainer):
    with pytest.raises(rt.DisagreementError, match=r"after epoch 0 rank\(s\) \[1\] have another body\.3\.weight.*0\.5"):
        ray_trainer(max_epochs=2).fit(Drifts(), loader(32, 4))
    ray_trainer(max_epochs=2, strategy=rt.DDP(check_replicas=False)).fit(Drifts(), loader(32, 4))
    normalised = Normalised()
    ray_trainer(max_epochs=3).fit(normalised, loader(32, 4))
    assert normalised.norm.num_batches_tracked == 12


def test_step_values_are_averaged_where_asked(ray_trainer):
    class Logs(Net):
        def training_step(self, batch, batch_idx):
            self.log("own", float(self.global_rank))
            self.log("synced", float(self.global_rank), sync_dist=True)
            self.log("total", float(self.global_rank + 1), sync_dist=True, reduce_fx="sum")
            self.log("epoch", float(self.global_rank), on_step=False, on_epoch=True)
            self.log("first", 1.0 + self.global_rank, on_step=False, on_epoch=True, rank_zero_only=True)
            return super().training_step(batch, batch_idx)

    trainer = ray_trainer(max_epochs=1, log_every_n_steps=1)
    trainer.fit(Logs(), loader(16, 4))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found | {"own": 0.0, "synced": 0.5, "total": 3.0, "epoch": 0.5, "first": 1.0} == found
    assert trainer.logged_metrics["synced"] == 0.5


def test_workers_begin_with_the_drivers_weights(ray_trainer):
    class Checks(Net):
        def on_fit_start(self):
            self.initial = self.all_gather(torch.cat([p.detach().flatten() for p in self.parameters()]))

        def on_train_end(self):
            self.final = self.all_gather(torch.cat([p.detach().flatten() for p in self.parameters()]))

    module = Checks()
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    ray_trainer(max_epochs=1).fit(module, loader(16, 4))
    assert torch.equal(module.initial, torch.stack([before, before]))
    assert torch.equal(module.final[0], module.final[1]) and not torch.equal(module.final[0], before)


class Noisy(Net):
    """Draws from every generator, and notes what all workers drew."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.drawn: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.drawn.append(self.all_gather(torch.rand(2)))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_same_seed_gives_the_same_bits(num_workers, ray_trainer):
    class Augmented(torch.utils.data.Dataset):
        samples = table(32)

        def __len__(self):
            return 32

        def __getitem__(self, index):
            x, y = self.samples[index]
            return x + torch.rand(()), y

    modules = [Noisy() for _ in range(3)]
    for module, seed in zip(modules, (5, 5, 6), strict=True):
        data = DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=num_workers)
        ray_trainer(max_epochs=2, seed=seed, deterministic=True).fit(module, data)
    assert_same(modules[0], modules[1])
    assert moved(modules[0], modules[2])
    for draw in modules[0].drawn:
        assert not torch.equal(draw[0], draw[1])  # ranks have streams of their own
    assert not torch.equal(modules[0].drawn[0], modules[0].drawn[1])


def test_without_a_seed(ray_trainer):
    """Runs differ, unless the user has seeded torch on the driver; ranks differ always."""
    modules = [Noisy() for _ in range(3)]
    for module, seed in zip(modules, (None, 1, 1), strict=True):
        if seed is not None:
            torch.manual_seed(seed)
        ray_trainer(max_epochs=1).fit(module, loader(16, 4, shuffle=True))
        assert not torch.equal(module.drawn[0][0], module.drawn[0][1])
    assert moved(modules[0], modules[1])
    assert_same(modules[1], modules[2])
