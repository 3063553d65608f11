"""Runs of ddp2 and dp in plain processes that play the workers of one or two nodes, without Ray.

`main(rank, folder)` plays worker `rank` in every case that has one, and pickles what it found.
"""

from __future__ import annotations

import gc
import pickle
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from raytrainer import Module
from raytrainer.data.slicing import join_parts
from raytrainer.plan.ranks import Ranks
from raytrainer.plan.settings import build_settings
from raytrainer.task import Task
from raytrainer.worker.evaluation_loop import to_cpu
from raytrainer.worker.process_group import ProcessGroup, make_store
from raytrainer.worker.worker import Worker

WORKERS = 4
SEED = 11


def table(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x.sin() + 0.1 * torch.randn(samples, 4, generator=generator, dtype=torch.float64))


def contrastive(z: Tensor, t: Tensor, temperature: Tensor) -> Tensor:
    """Each sample is to be told from all others of the batch."""
    logits = nn.functional.normalize(z, dim=1) @ nn.functional.normalize(t, dim=1).T * temperature.exp()
    return nn.functional.cross_entropy(logits, torch.arange(len(z), device=z.device))


class Pair(Module):
    """Two encoders, and a temperature that is used in `training_step_end` only."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.one = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.other = nn.Linear(4, 3).double()
        self.temperature = nn.Parameter(torch.zeros((), dtype=torch.float64))
        for parameter in (*self.one.parameters(), *self.other.parameters()):
            nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)
        self.seen: list[Any] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.log("mean_x", x.mean(), on_epoch=True)
        self.log("samples", float(len(x)), on_step=False, on_epoch=True, reduce_fx="sum")
        return {"z": self.one(x), "pair": [self.other(y)], "norm": x.norm()}

    def training_step_end(self, outputs):
        loss = contrastive(outputs["z"], outputs["pair"][0], self.temperature)
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        self.log("batches", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("largest", float(len(outputs["z"])), on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_samples", float(len(x)), reduce_fx="sum")
        return self.one(x), self.other(y)

    def validation_step_end(self, outputs):
        self.log("val_loss", contrastive(*outputs, self.temperature))
        self.log("val_batches", 1.0, reduce_fx="sum")

    def predict_step(self, batch, batch_idx):
        return {"z": self.one(batch[0]), "names": [f"{v:.3f}" for v in batch[0][:, 0].tolist()]}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Plain(Pair):
    """A loss that is a mean over samples, and no `*_step_end`."""

    training_step_end = None
    validation_step_end = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.distance(x, y).mean()
        self.log("loss", loss, on_epoch=True)
        return {"loss": loss}

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.one(x) * self.temperature.exp() - self.other(y)).square()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.distance(*batch).mean())


class Manual(Pair):
    """Steps by hand in `training_step_end`, where the whole batch is known."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step_end(self, outputs):
        loss = contrastive(outputs["z"], outputs["pair"][0], self.temperature)
        self.log("loss", loss, on_epoch=True)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Noisy(Dataset):
    """Random augmentation in the process that reads, from the global generator."""

    def __init__(self, samples: int) -> None:
        self.rows = table(samples)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        x, y = self.rows[index]
        return x + torch.randn(4, dtype=x.dtype), y


class Looks(Pair):
    """Notes the batches that it is given, and a draw of its own."""

    def training_step(self, batch, batch_idx):
        self.seen.append((batch[0].clone(), float(torch.rand(()))))
        return super().training_step(batch, batch_idx)


@dataclass
class Case:
    """One fit, by `nodes` x `per_node` workers."""

    module: type[Module] = Pair
    nodes: int = 1
    per_node: int = 2
    strategy: str = "ddp2"
    samples: int = 27
    batch_size: int = 5
    noisy: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)

    def make_loader(self, shuffle: bool = True) -> DataLoader[Any]:
        dataset = Noisy(self.samples) if self.noisy else table(self.samples)
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle, **self.loader)


CASES = {
    "two": Case(),
    "three": Case(per_node=3),
    "dp": Case(strategy="dp"),
    "accumulate": Case(options={"accumulate_grad_batches": 4}),
    "clip": Case(per_node=3, options={"gradient_clip_val": 0.05}),
    "clip and accumulate": Case(options={"gradient_clip_val": 0.02, "accumulate_grad_batches": 3}),
    "one sample left": Case(samples=26),
    "plain": Case(Plain, samples=26),
    "plain three": Case(Plain, per_node=3, options={"accumulate_grad_batches": 2}),
    "manual": Case(Manual, per_node=3),
    "two nodes": Case(nodes=2, samples=36),
    "two nodes plain": Case(Plain, nodes=2, samples=36),
    "noisy": Case(Looks, noisy=True),
    "own sampler": Case(Looks, options={"use_distributed_sampler": False}),
    "noisy processes": Case(Looks, noisy=True, loader={"num_workers": 1}),
    "fewer than workers": Case(Plain, per_node=3, samples=2, batch_size=2),
}


@dataclass
class Found:
    """What one worker has after a case."""

    weights: dict[str, Tensor]
    train: list[Any]  # MetricReport of each epoch
    steps: list[Any]  # TrainReport of each epoch
    validation: Any  # EvaluationReport
    predictions: list[Any]
    seen: list[Any]
    gathered: Any = None


def play(
    case: Case, ranks: Ranks, group: ProcessGroup | None, epochs: int = 2, device: torch.device | None = None
) -> Found:
    """Fit, validate and predict as the coordinator would have it."""
    worker = Worker(ranks, device, in_place=True)
    worker.group = group
    module = case.module()
    strategy = case.strategy if ranks.world_size > 1 else "local"
    sizes = {} if strategy == "local" else {"num_nodes": ranks.num_nodes, "num_processes": ranks.local_world_size}
    settings = build_settings(strategy=strategy, log_every_n_steps=1, **sizes, **case.options)

    def start(stage: str, loaders: dict[str, Any]) -> None:
        worker.setup(Task(stage, module, None, settings, [], loaders, seed=SEED))

    start("fit", {"train": case.make_loader()})
    worker.start_fit()
    worker.start_training()
    train, steps = [], []
    for epoch in range(epochs):
        worker.start_epoch(epoch)
        steps.append(worker.train(1000))
        worker.end_batches()
        train.append(worker.end_epoch())
    worker.end_training()
    worker.end_fit()
    worker.finish(True)
    start("validate", {"val": case.make_loader(shuffle=False)})
    worker.start_evaluation("validate")
    worker.evaluate(1000)
    validation = worker.end_evaluation_epoch()
    worker.end_evaluation()
    start("predict", {"predict": case.make_loader(shuffle=False)})
    worker.start_evaluation("predict")
    predictions = worker.evaluate(1000).predictions
    worker.end_evaluation_epoch()
    worker.end_evaluation()
    worker.finish(False)
    weights = {name: value.cpu() for name, value in module.state_dict().items()}
    return Found(weights, train, steps, validation, predictions, module.seen)


def gather_all_kinds(ranks: Ranks, group: ProcessGroup, device: torch.device) -> Any:
    """The gather itself: every dtype, uneven rows, nesting, nothing; and what happens to unequal structures."""
    from raytrainer.errors import DataError
    from raytrainer.strategies import DPStrategy
    from raytrainer.strategies.strategy import NOTHING

    strategy = DPStrategy(ranks, device, group.control, None, *group.of_node(ranks))
    rank = ranks.rank
    rows = torch.arange(2.0 * (rank + 1)).reshape(-1, 2) + 10 * rank
    dtypes = (torch.bool, torch.int64, torch.bfloat16, torch.float16, torch.float64, torch.uint8)
    output = {
        "kinds": [rows.to(dtype) for dtype in dtypes],
        "scalar": torch.tensor(float(rank)),
        "number": rank,
        "names": [f"{rank}.{i}" for i in range(rank + 1)],
        "other": (None, {"inner": rows}),
    }
    long = strategy.gather([f"{rank}" * 3000])
    assert long == [[f"{other}" * 3000] for other in range(3)]
    joined = to_cpu(join_parts(strategy.gather(NOTHING if rank == 1 else output)))
    try:
        strategy.gather(rows if rank == 0 else rows.flatten())
    except DataError as error:
        return joined, str(error)
    return joined, "no error"


def main(rank: int, folder: Path, gpus: int = 0) -> None:
    """`gpus`: how many there are; cases that need more are left out. 0: CPUs and gloo."""
    gc.freeze()  # looking for garbage would copy all memory that is shared with the test's process
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    found: dict[str, Found | Any] = {}
    for number, (name, case) in enumerate([*CASES.items(), ("gather", Case(per_node=3))]):
        world = case.nodes * case.per_node
        if rank >= world or (gpus and world > gpus):
            continue
        node, local = divmod(rank, case.per_node)
        ranks = Ranks(rank, world, local, case.per_node, node, case.nodes)
        address, store = folder / f"port{number}", None
        if rank == 0:
            store, port = make_store("127.0.0.1", world)
            address.with_suffix(".new").write_text(str(port))
            address.with_suffix(".new").rename(address)
        while not address.exists():
            time.sleep(0.01)
        port = int(address.read_text())
        backend = "nccl" if gpus else "gloo"
        group = ProcessGroup(ranks, "127.0.0.1", port, "127.0.0.1", backend, device, store, timeout=120.0)
        try:
            gathers = name == "gather"
            found[name] = gather_all_kinds(ranks, group, device) if gathers else play(case, ranks, group, device=device)
        finally:
            group.close()
    (folder / f"found{rank}").write_bytes(pickle.dumps(found))
