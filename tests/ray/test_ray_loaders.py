"""Loaders inside Ray workers: processes of their own, iterable datasets, samplers, and loaders that fit nobody."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from ray_models import Net, alive, assert_same, eventually, loader, moved, numbers, table
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

import raytrainer
from raytrainer import DataModule, Module
from raytrainer.errors import ConfigurationError, DataError, MetricError


class Records(Net):
    """Keeps the first number of each sample that every worker trained on, epoch by epoch: (rank, number)."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[list[list[float]]] = []
        self.now: list[float] = []

    def training_step(self, batch, batch_idx):
        self.now += batch.flatten().tolist()
        return self(torch.ones(1, 4)).sum()

    def on_train_epoch_end(self):
        gathered = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, self.now)
        self.epochs.append(gathered)
        self.now = []


def test_loader_processes(ray_trainer):
    """They run, give what no processes give, and end with the run."""

    class Pids(Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            return torch.tensor([os.getpid()])

    class Collects(Net):
        def __init__(self):
            super().__init__()
            self.pids = set()

        def training_step(self, batch, batch_idx):
            self.pids |= {int(pid) for pid in self.all_gather(batch).flatten()}
            return self(torch.ones(1, 4)).sum()

    module = Collects()
    ray_trainer(max_epochs=1).fit(module, DataLoader(Pids(), batch_size=3, num_workers=2))
    assert len(module.pids) == 4
    eventually(lambda: not any(alive(pid) for pid in module.pids), "loader processes end")

    modules = Net(), Net()
    for module, processes in zip(modules, (0, 2), strict=True):
        ray_trainer(max_epochs=2, seed=4).fit(module, loader(32, 4, shuffle=True, num_workers=processes))
    assert_same(*modules)


@pytest.mark.sample(1)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_loader_processes_that_import_classes_by_name(method, ray_trainer):
    """A script's and a notebook's own have come to the worker by value, and go to such processes by value too."""

    class Own(Dataset):
        def __init__(self):
            self.shared = torch.arange(12.0)

        def __len__(self):
            return 12

        def __getitem__(self, index):
            return self.shared[index : index + 1]

    def together(samples):
        return torch.stack(samples)

    class Data(DataModule):
        def train_dataloader(self):
            return DataLoader(Own(), 3, num_workers=1, collate_fn=together, multiprocessing_context=method)

    module = Records()
    ray_trainer(max_epochs=1).fit(module, datamodule=Data())
    assert sorted(module.epochs[0][0] + module.epochs[0][1]) == list(range(12))


class Collecting(Dataset):
    """Collects garbage wherever its samples are made."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        gc.collect()
        return table(16)[index]


def test_loader_processes_leave_garbage_alone(one_process):
    """What a forked process inherits is not its own: destructors there may crash, or wait for threads it has not."""

    class Trap:
        def __init__(self):
            self.itself, self.pid = self, os.getpid()

        def __del__(self):
            if os.getpid() != self.pid:
                os._exit(3)

    class Litters(Net):
        def on_train_epoch_start(self):
            gc.disable()  # lest it be collected here before the fork
            Trap()

        def on_train_batch_start(self, batch, batch_idx):
            gc.enable()

    trainer = one_process(max_epochs=1)
    trainer.fit(Litters(), DataLoader(Collecting(), 4, num_workers=1))
    assert trainer.global_step == 4


@pytest.mark.parametrize("ends", ["well", "by limit", "badly"])
def test_loader_processes_end_with_the_run(ends, one_process, tmp_path):
    """At once, without the help of garbage collection, which takes seconds for each process."""

    class Pids(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            (tmp_path / str(os.getpid())).touch()
            if ends == "badly" and index == 9:
                raise KeyError(index)
            return table(40)[index]

    data = DataLoader(Pids(), 4, num_workers=2, persistent_workers=True)
    trainer = one_process(max_epochs=2, limit_train_batches=3 if ends == "by limit" else 1.0)
    gc.disable()
    try:
        if ends == "badly":
            with pytest.raises(KeyError):
                trainer.fit(Net(), data)
        else:
            trainer.fit(Net(), data)
        pids = [int(path.name) for path in tmp_path.iterdir()]
        assert len(pids) == 2 and not any(map(alive, pids))
    finally:
        gc.enable()


def test_loader_processes_after_a_failure(ray_trainer):
    """A failed run's process group hangs on a cycle of DDP's; it must be gone when workers have joined a new one."""

    class Fails(Net):
        def on_train_epoch_end(self):
            gc.disable()  # nothing is collected here by chance before the next fork
            raise ValueError("after training")

    class Succeeds(Net):
        def setup(self, stage):
            kept = [o for o in gc.get_objects() if type(o) is torch.nn.parallel.DistributedDataParallel]
            assert not kept

        def teardown(self, stage):
            gc.enable()

    with pytest.raises(ValueError, match="after training"):
        ray_trainer(max_epochs=1).fit(Fails(), loader(16, 4))
    trainer = ray_trainer(max_epochs=1, max_failures=0)
    trainer.fit(Succeeds(), DataLoader(Collecting(), 4, num_workers=1))
    assert trainer.global_step == 2


def test_shuffling_covers_everything_anew_each_epoch(ray_trainer):
    module = Records()
    ray_trainer(max_epochs=3, seed=1).fit(module, numbers(20, 4, shuffle=True))
    orders = [tuple(map(tuple, epoch)) for epoch in module.epochs]
    assert len(set(orders)) == 3
    for first, second in module.epochs:
        assert sorted(first + second) == list(range(20))


def test_without_our_sampler_every_worker_reads_all(ray_trainer):
    module = Records()
    ray_trainer(max_epochs=1, use_distributed_sampler=False).fit(module, numbers(8, 2))
    assert module.epochs == [[[*range(8)]] * 2]


def test_the_users_own_distributed_sampler_is_kept(ray_trainer):
    class Data(DataModule):
        def train_dataloader(self):
            data = torch.arange(12.0).unsqueeze(1)
            sampler = DistributedSampler(data, shuffle=True, seed=9)
            return DataLoader(data, batch_size=2, sampler=sampler)

    module = Records()
    ray_trainer(max_epochs=2, seed=1).fit(module, datamodule=Data())
    for epoch, parts in enumerate(module.epochs):
        for rank, part in enumerate(parts):
            sampler = DistributedSampler(range(12), num_replicas=2, rank=rank, shuffle=True, seed=9)
            sampler.set_epoch(epoch)
            assert part == list(sampler)


def test_a_custom_batch_sampler_is_sharded_by_batches(ray_trainer):
    class Buckets(torch.utils.data.Sampler):
        def __iter__(self):
            yield from ([0, 1, 2], [3], [4, 5], [6, 7])

        def __len__(self):
            return 4

    module = Records()
    ray_trainer(max_epochs=1).fit(module, DataLoader(torch.arange(8.0).unsqueeze(1), batch_sampler=Buckets()))
    assert module.epochs == [[[0, 1, 2, 4, 5], [3, 6, 7]]]


class Stream(IterableDataset):
    """Worker r yields `lengths[r]` samples."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def __iter__(self):
        rank = torch.distributed.get_rank()
        for i in range(self.lengths[rank]):
            yield torch.tensor([100.0 * rank + i])


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}], ids=str)
def test_iterable_datasets_of_unequal_length_end_together(options, ray_trainer):
    module = Records()
    trainer = ray_trainer(max_epochs=2, **options)
    trainer.fit(module, DataLoader(Stream(9, 13), batch_size=2))
    # five batches on rank 0, the last of one sample; rank 1 would have two more
    assert module.epochs == [[[*range(9)], [100.0 + i for i in range(10)]]] * 2
    assert trainer.global_step == (4 if options else 10)


def test_several_loaders_at_once(ray_trainer):
    class Both(Records):
        def training_step(self, batch, batch_idx):
            return super().training_step(torch.cat([batch["a"], batch["b"]]), batch_idx)

    def numbers(start, count):
        return DataLoader(torch.arange(start, start + count).float().unsqueeze(1), 2, shuffle=True)

    module = Both()
    trainer = ray_trainer(max_epochs=2)
    trainer.fit(module, {"a": numbers(0, 16), "b": numbers(100, 8)})
    assert trainer.global_step == 8
    for epoch in module.epochs:
        both = sorted(x for part in epoch for x in part)
        assert both == [*range(16), *(x for i in range(100, 108) for x in (i, i))]
    assert module.epochs[0] != module.epochs[1]


class Counts(Records):
    def validation_step(self, batch, batch_idx):
        self.log("count", float(len(batch)), reduce_fx="sum")


class Numbers(IterableDataset):
    """Numbers up to 23: all of them, or this process's part."""

    def __init__(self, divided):
        self.divided = divided

    def __iter__(self):
        part, parts = raytrainer.data_part() if self.divided else (0, 1)
        yield from (torch.tensor([float(i)]) for i in range(part, 24, parts))


@pytest.mark.sample(1)
@pytest.mark.parametrize(("processes", "method"), [(0, None), (2, "fork"), (1, "spawn")])  # which take seconds each
def test_streams_that_ask_which_part_is_theirs(processes, method, ray_trainer, caplog):
    module = Records()
    loader = DataLoader(Numbers(True), batch_size=2, num_workers=processes, multiprocessing_context=method)
    ray_trainer(max_epochs=1).fit(module, loader)
    assert sorted(x for part in module.epochs[0] for x in part) == list(range(24))
    assert "Workers read the same" not in caplog.text


def test_streams_that_workers_read_alike(ray_trainer, caplog):
    trainer = ray_trainer(max_epochs=2)
    stream = DataLoader(Numbers(False), batch_size=2)
    trainer.validate(Counts(), stream, verbose=False)
    trainer.fit(Counts(), stream)
    assert raytrainer.rank() == 0 and raytrainer.world_size() == 1
    said = [r.getMessage() for r in caplog.records if "Workers read the same" in r.getMessage()]
    assert ["from the val loader" in text for text in said] == [True, False]
    assert all("ranks 0 and 1" in text and "rt.data_part()" in text for text in said)


def test_a_distributed_sampler_made_on_the_driver(ray_trainer):
    data = torch.arange(12.0).unsqueeze(1)
    sampler = DistributedSampler(data, raytrainer.world_size(), raytrainer.rank(), shuffle=False)
    module = Records()
    ray_trainer(max_epochs=1).fit(module, DataLoader(data, batch_size=2, sampler=sampler))
    assert module.epochs == [[[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]]


def test_iterable_datasets_in_evaluation_are_read_to_the_end(ray_trainer):
    (metrics,) = ray_trainer().validate(Counts(), DataLoader(Stream(3, 8), batch_size=2), verbose=False)
    assert metrics["count"] == 11


def test_a_stream_that_is_empty_for_one_rank(ray_trainer):
    """No training batch at all is an error that says where; training would go on for ever otherwise."""
    with pytest.raises(DataError, match="rank 1"):
        ray_trainer(max_epochs=2).fit(Net(), DataLoader(Stream(4, 0), batch_size=2))


def test_nothing_for_some_rank(ray_trainer):
    with pytest.raises(DataError, match=r"no batch for rank \d of 2.*3 sample.*batch_size=4"):
        ray_trainer(max_epochs=1).fit(Net(), loader(3, 4, drop_last=True))
    trainer = ray_trainer(max_epochs=1)
    trainer.fit(Net(), loader(8, 4), loader(3, 4))  # evaluation may have fewer batches than workers
    assert trainer.callback_metrics["samples"] == 3
    (metrics,) = trainer.validate(Net(), loader(3, 4), verbose=False)
    assert metrics["samples"] == 3


class Some(Module):
    """The mean of its inputs is the gradient; batches of small numbers are None."""

    def __init__(self, manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        self.layer = torch.nn.Linear(4, 1)
        torch.nn.init.zeros_(self.layer.weight)

    def training_step(self, batch, batch_idx):
        self.log("seen", batch.mean(), on_epoch=True)
        loss = self.layer(batch[:, None].expand(-1, 4)).mean()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.log("val", batch.mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def some(samples):
    batch = torch.stack(samples)
    return None if bool((batch < 10).any()) else batch


# by worker: [None, 10], [20, None], [None, None], [30, 40]; with manual optimization none may be alone
@pytest.mark.parametrize(
    ("strategy", "manual", "seen", "weight"),
    [
        ("ddp", False, (10 + 20 + 30 + 40) / 4, -(10 + 20 + 30 + 40) / 2),
        ("ddp", True, (30 + 40) / 2, -(30 + 40) / 2),
    ],
)
def test_a_batch_is_missing_on_one_rank(strategy, manual, seen, weight, ray_trainer):
    numbers = torch.tensor([0.0, 10.0, 20.0, 1.0, 2.0, 3.0, 30.0, 40.0])
    module = Some(manual)
    trainer = ray_trainer(max_epochs=1, strategy=strategy, num_sanity_val_steps=0)
    source = DataLoader(numbers, 1, collate_fn=some)
    trainer.fit(module, source, DataLoader(numbers[:3], 1, collate_fn=some))  # rank 0 validates two, rank 1 one
    assert trainer.callback_metrics["seen_epoch"] == seen
    assert trainer.callback_metrics["val"] == 15
    assert module.layer.weight.flatten().tolist() == [weight] * 4


def test_ranks_that_log_different_names(ray_trainer):
    class Differs(Net):
        def training_step(self, batch, batch_idx):
            self.log("common" if self.global_rank else "rare", 1.0, on_epoch=True, sync_dist=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log(f"val_{self.global_rank}", 1.0)

    with pytest.raises(MetricError, match=r"rank 0 did not log 'common'; rank 1 did not log 'rare'"):
        ray_trainer(max_epochs=1).fit(Differs(), loader(16, 4))
    with pytest.raises(MetricError, match=r"rank 0 did not log 'val_1'; rank 1 did not log 'val_0'"):
        ray_trainer().validate(Differs(), loader(16, 4), verbose=False)
    module = Net()
    ray_trainer(max_epochs=1).fit(module, loader(16, 4))
    assert moved(Net(), module)


def test_a_wrong_number_of_arguments_is_told_as_such(ray_trainer):
    class Net2(Net):
        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(ConfigurationError, match="2 loaders: add a dataloader_idx argument"):
        ray_trainer().validate(Net2(), [loader(8, 4), loader(8, 4)])


def test_datasets_of_a_datamodule(ray_trainer):
    data = DataModule.from_datasets(table(16), [table(8), table(4)], batch_size=4)
    trainer = ray_trainer(max_epochs=1)
    trainer.fit(Net(), datamodule=data)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["samples/dataloader_idx_1"] == 4


def test_a_loader_that_is_reloaded(ray_trainer):
    class Grows(DataModule):
        made = 0

        def train_dataloader(self):
            self.made += 1
            return numbers(8 * self.made, 4)

    module = Records()
    ray_trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(module, datamodule=Grows())
    assert [len(epoch[0]) for epoch in module.epochs] == [4, 8, 12]
