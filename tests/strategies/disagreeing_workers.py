"""Runs in which workers disagree, in plain processes that play the workers, without Ray.

`found_by_all` plays all cases and says what each worker found: its weights, or its error.
"""

from __future__ import annotations

import gc
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from forked_group import FORK
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel  # noqa: F401  imports much, once for all
from torch.utils.data import DataLoader

from raytrainer import Module
from raytrainer.plan.ranks import Ranks
from raytrainer.plan.settings import build_settings
from raytrainer.plan.strategy_settings import DDP, DDP2
from raytrainer.task import Task
from raytrainer.worker.process_group import ProcessGroup, make_store
from raytrainer.worker.worker import Worker

BATCHES = 4
EPOCHS = 2


def sample(epoch: int, batch_idx: int, rank: int) -> Tensor:
    """Data of a batch, in (samples, features)."""
    generator = torch.Generator().manual_seed(1000 * epoch + 10 * batch_idx + rank)
    return torch.randn(3, 4, generator=generator, dtype=torch.float64)


class Part(nn.Module):
    """Something that trains: maps a batch of samples to numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


class Sparse(Part):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(7, 2, sparse=True).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.rows((x[:, 0].abs() * 3).long() % 7)


class Complex(Part):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.complex(torch.rand(2).double(), torch.rand(2).double()))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.phase).abs()


class Mixed(Part):
    """Of two dtypes, partly frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.single, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2).double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.single(self.frozen(self.layer(x)).float()).double()


class Unused(Part):
    """A parameter that no loss depends on, and one that every second batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.often = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.often(y) if x[0, 0] > 0 else y


class Lazy(Part):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.LazyLinear(2)


class Net(Module):
    """A part whose losses `verdict` may change: it says what (batch_idx, rank) has in place of a loss, if anything."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.part, self.case = case.part(), case
        self.automatic_optimization = not case.manual
        self.told: list[Any] = []

    def loss(self, epoch: int, batch_idx: int, rank: int) -> Tensor | None:
        loss = self.part(sample(epoch, batch_idx, rank)).square().mean()
        return self.case.verdict(batch_idx, rank, loss)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(self.current_epoch, batch_idx, self.global_rank)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if loss is not None:
            self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return self.case.optimizer([p for p in self.parameters() if p.requires_grad])


Verdict = Callable[[int, int, Tensor], Tensor | None]


def adam(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, 0.05, weight_decay=0.5)


def plain(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, 0.3)


def searching(parameters: Any) -> Any:
    """Evaluates until its line search is content, so that ranks which see other losses evaluate otherwise often."""
    return torch.optim.LBFGS(parameters, max_iter=5, line_search_fn="strong_wolfe")


class SharpnessAware(torch.optim.SGD):
    """Evaluates a second time, at weights that have been moved up the gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        closure = torch.enable_grad()(closure)
        loss = closure()
        moved = [(p, 0.1 * p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, by in moved:
            parameter.add_(by)
        closure()
        for parameter, by in moved:
            parameter.sub_(by)
        super().step()
        return loss


def sharpness_aware(parameters: Any) -> Any:
    return SharpnessAware(parameters, 0.3, momentum=0.9)


@dataclass
class Case:
    verdict: Verdict
    part: Callable[[], nn.Module] = Part
    optimizer: Callable[[Any], Any] = adam
    manual: bool = False
    accumulate: int = 1
    world: int = 2
    ddp: DDP = field(default_factory=DDP)


def leaf() -> Tensor:
    return torch.zeros((), requires_grad=True)


VERDICTS: dict[str, Verdict] = {
    "losses": lambda batch_idx, rank, loss: loss,
    "none by one": lambda batch_idx, rank, loss: None if rank and batch_idx != 1 else loss,
    "none by all": lambda batch_idx, rank, loss: None if batch_idx != 1 else loss,
    "none by turns": lambda batch_idx, rank, loss: None if batch_idx == 2 or (batch_idx + rank) % 2 else loss,
    "leaf by one": lambda batch_idx, rank, loss: leaf() if rank == 0 and batch_idx % 2 else loss,
    "leaf by all": lambda batch_idx, rank, loss: leaf() if batch_idx % 2 else loss,
    "zero by one": lambda batch_idx, rank, loss: loss * 0 if rank else loss,
}
UNUSED = DDP(find_unused_parameters=True)
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "three": {"world": 3},
    "sparse": {"part": Sparse, "optimizer": plain},
    "sparse three": {"part": Sparse, "optimizer": plain, "world": 3},
    "complex": {"part": Complex},
    "mixed": {"part": Mixed},
    "unused": {"part": Unused, "ddp": UNUSED},
    "unviewed": {"ddp": DDP(gradient_as_bucket_view=False, broadcast_buffers=False)},
}
#: What trains as in one process, by (kind, mode, verdict).
RIGHT: dict[tuple[str, str, str], Case] = {}
for kind, changes in KINDS.items():
    for verdict, function in VERDICTS.items():
        RIGHT[kind, "automatic", verdict] = Case(function, **changes)
        if kind in ("dense", "sparse", "unused") and verdict != "losses":
            RIGHT[kind, "accumulating", verdict] = Case(function, accumulate=2, **changes)
    if kind in ("dense", "three"):
        for optimizer in (searching, sharpness_aware):
            for accumulate in (1, 3):
                for verdict in ("losses", "none by one", "none by all"):
                    by = f"{optimizer.__name__} {accumulate}"
                    RIGHT[kind, by, verdict] = Case(
                        VERDICTS[verdict], optimizer=optimizer, accumulate=accumulate, **changes
                    )
    for verdict in ("losses", "zero by one", "none by all"):
        RIGHT[kind, "manual", verdict] = Case(VERDICTS[verdict], manual=True, **changes)


def at(batch: int, rank: int, instead: Callable[[Tensor], Tensor | None]) -> Verdict:
    return lambda batch_idx, own, loss: instead(loss) if (batch_idx, own) == (batch, rank) else loss


#: What all workers are to be told of, and words of it.
WRONG: dict[str, tuple[Case, tuple[str, ...]]] = {
    "a constant": (Case(at(1, 1, lambda loss: torch.zeros(()))), ("without a graph in batch 1 of rank 1", "None")),
    "detached": (Case(at(2, 0, Tensor.detach)), ("without a graph in batch 2 of rank 0", "None to skip")),
    "a vector": (Case(at(0, 1, lambda loss: loss.repeat(2))), ("of shape (2,) in batch 0 of rank 1", "mean()")),
    "accumulating": (
        Case(at(1, 1, lambda loss: torch.zeros(())), accumulate=2), ("without a graph in batch 1 of rank 1",),
    ),
    "a part unused": (
        Case(VERDICTS["losses"], part=Unused, ddp=DDP2()),
        ("does not depend on part.never.weight", "strategy=DDP2(find_unused_parameters=True)"),
    ),
    "no shape yet": (Case(VERDICTS["losses"], part=Lazy), ("part.late.weight", "lazy", "Call the module")),
    "another graph": (
        Case(at(3, 1, lambda loss: torch.ones((), requires_grad=True) * 2)),
        ("loss of rank 1 in batch 3 does not depend on part.layer.weight", "None"),
    ),
    "static": (
        Case(at(1, 1, lambda loss: None), ddp=DDP(static_graph=True)), ("no loss in batch 1 of rank 1", "static_graph"),
    ),
    "manual, left out": (
        Case(at(1, 1, lambda loss: None), manual=True),
        ("left out by rank(s) [1]", "rank 0 is at call 1 in batch 1", "rank 1 is at call 1 in batch 2", "loss of zero"),
    ),
    "manual, the last": (
        Case(at(3, 0, lambda loss: None), manual=True),
        ("left out by rank(s) [0]", "rank 0 is through with batch 3", "rank 1 is at call 1 in batch 3"),
    ),
    "manual, three": (
        Case(at(2, 1, lambda loss: None), manual=True, world=3), ("left out by rank(s) [1]", "batch 2"),
    ),
}  # fmt: skip


def reference(case: Case) -> dict[str, Tensor]:
    """Weights after a loop by hand, in which one process computes the losses of all ranks."""
    module = Net(case)
    optimizer = module.configure_optimizers()

    def evaluate(epoch: int, window: range) -> float:
        optimizer.zero_grad()
        total = 0.0
        for batch_idx in window:
            for rank in range(case.world):
                loss = module.loss(epoch, batch_idx, rank)
                if loss is not None:
                    loss = loss / case.world / case.accumulate
                    loss.backward()
                    total += loss.item()
        return total

    for epoch in range(EPOCHS):
        for first in range(0, BATCHES, case.accumulate):
            window = range(first, min(first + case.accumulate, BATCHES))
            optimizer.step(lambda window=window, epoch=epoch: evaluate(epoch, window))
    return {name: value.detach() for name, value in module.state_dict().items()}


def play(case: Case, ranks: Ranks, group: ProcessGroup) -> dict[str, Tensor]:
    worker = Worker(ranks, in_place=True)
    worker.group = group
    module = Net(case)
    settings = build_settings(strategy=case.ddp, num_processes=case.world, accumulate_grad_batches=case.accumulate)
    batches = DataLoader(range(BATCHES * case.world), batch_size=1)  # type: ignore[arg-type]
    worker.setup(Task("fit", module, None, settings, [], {"train": batches}, seed=1))
    worker.start_fit()
    worker.start_training()
    for epoch in range(EPOCHS):
        worker.start_epoch(epoch)
        worker.train(BATCHES)
        worker.end_batches()
        worker.end_epoch()
    worker.finish(True)
    return {name: value.detach() for name, value in module.state_dict().items()}


def case_of(name: Any) -> Case:
    return RIGHT[name] if name in RIGHT else WRONG[name][0]


def work(names: list[Any], ranks: Ranks, folder: Path) -> None:
    """One worker's life: all cases of these names, or up to the first one that fails."""
    gc.freeze()  # looking for garbage would copy all memory that is shared with the test's process
    torch.set_num_threads(1)
    port = folder / "port"
    store = None
    if ranks.rank == 0:
        store, number = make_store("127.0.0.1", ranks.world_size)
        write(port, str(number).encode())
    while not port.exists():
        time.sleep(0.005)
    group = ProcessGroup(
        ranks, "127.0.0.1", int(port.read_text()), "127.0.0.1", "gloo", torch.device("cpu"), store, timeout=100.0
    )
    found: dict[Any, Any] = {}
    for name in names:
        try:
            found[name] = play(case_of(name), ranks, group)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            break
    write(folder / f"found{ranks.rank}", pickle.dumps(found))
    if any(isinstance(f, str) for f in found.values()):
        signal.pause()  # until the driver, here `Group`, ends all workers
    group.close()


def write(path: Path, content: bytes) -> None:
    """All of it, or nothing."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.rename(path)


class Group:
    """Workers in processes of their own, which have begun with some cases.

    Once one has failed, others get two seconds, and are killed, as the driver does.
    """

    def __init__(self, names: list[Any], folder: Path) -> None:
        folder.mkdir()
        self.names, world = names, case_of(names[0]).world
        self.files = [folder / f"found{rank}" for rank in range(world)]
        self.limit, self.failed = time.monotonic() + 240.0, False
        self.processes = [
            FORK.Process(target=work, args=(names, Ranks(rank, world, rank, world), folder)) for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def found(self) -> list[dict[Any, Any]]:
        return [pickle.loads(file.read_bytes()) if file.exists() else {} for file in self.files]

    def busy(self) -> bool:
        """Whether some worker is still to say what it has found."""
        if not self.failed and any(isinstance(f, str) for own in self.found() for f in own.values()):
            self.failed, self.limit = True, time.monotonic() + 2.0
        working = any(
            process.is_alive() and not file.exists() for process, file in zip(self.processes, self.files, strict=True)
        )
        return working and time.monotonic() < self.limit

    def end(self) -> list[dict[Any, Any]]:
        found = self.found()
        for process in self.processes:
            if any(len(own) < len(self.names) or isinstance(list(own.values())[-1], str) for own in found):
                process.kill()
            process.join()
        return found


def found_by_all(folder: Path) -> dict[Any, list[Any]]:
    """What each worker has found, by case. What is right goes one after the other, what is wrong at the same time."""
    together = [[name for name, case in RIGHT.items() if case.world == world] for world in (2, 3)]
    found: dict[Any, list[Any]] = {}
    for index, started in enumerate([*([names] for names in together), [[name] for name in WRONG]]):
        groups = [Group(names, folder / f"{index}-{number}") for number, names in enumerate(started)]
        while any([group.busy() for group in groups]):
            time.sleep(0.005)
        for group in groups:
            for own in group.end():
                for name, what in own.items():
                    found.setdefault(name, []).append(what)
    return found
