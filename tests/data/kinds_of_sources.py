"""Kinds of sources that people bring, and what a run makes of them: each sample once, and the same after resuming.

`measure` fits over a source, in this process or on two workers, and resumes from five places of that run: within each
of three epochs, at the end of the first, and right after it. `test_kinds_of_sources.py` has some of this in the suite;
all of it, as a table:

    python tests/data/kinds_of_sources.py [--only PATTERN] [--ray]
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import io
import logging
import math
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import raytrainer as rt

SAMPLES = 32
EPOCHS = 3
#: Steps after which a run is resumed: within epochs, and at the end of the first.
END = 8
PLACES = (3, END, 9, 15, 18)


class Noisy(Dataset[Any]):
    """Numbers, each with something drawn for it."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (list, tuple)) or getattr(index, "ndim", 0):
            return torch.stack([self[int(each)] for each in index])
        return torch.tensor([float(index), torch.rand(()).item(), random.random(), numpy.random.rand()])


class Unseeded(Sampler[int]):
    """Draws from the global generator."""

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Any:
        return iter(numpy.random.permutation(SAMPLES).tolist())


class InPlace(Sampler[int]):
    """Shuffles the order of the epoch before."""

    def __init__(self) -> None:
        self.order = list(range(SAMPLES))

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Any:
        random.shuffle(self.order)
        return iter(self.order)


class ByLength(Sampler[list[int]]):
    """Batches of what is alike, by a generator of its own; in odd epochs smaller ones, and so more of them."""

    def __init__(self, batch: int, form: Callable[[list[int]], Any] = list, varies: bool = True) -> None:
        self.rng, self.batch, self.form, self.varies, self.epoch = random.Random(4), batch, form, varies, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def size(self) -> int:
        return self.batch // 2 if self.epoch % 2 and self.varies else self.batch

    def __len__(self) -> int:
        return SAMPLES // self.size

    def __iter__(self) -> Any:
        order = list(range(SAMPLES))
        self.rng.shuffle(order)
        order.sort(key=lambda number: number % 2)  # its "length"
        batches = [order[at : at + self.size] for at in range(0, SAMPLES, self.size)]
        self.rng.shuffle(batches)
        return iter([self.form(batch) for batch in batches])


class ReadsAhead(DataLoader[Any]):
    """Has read the next batch before it gives one."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        ahead = next(batches, None)
        while ahead is not None:
            batch, ahead = ahead, next(batches, None)
            yield batch


class Mixes(DataLoader[Any]):
    """Shuffles batches, as far as they are in a buffer."""

    def __iter__(self) -> Any:
        held: list[Any] = []
        for batch in super().__iter__():
            held.append(batch)
            if len(held) == 3:
                yield held.pop(random.randrange(3))
        yield from held


class Repeats(DataLoader[Any]):
    """Gives each batch twice."""

    def __len__(self) -> int:
        return 2 * super().__len__()

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch
            yield batch.clone()


class Endless:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Any:
        while True:
            yield from self.inner


class Keeps(DataLoader[Any]):
    """Makes its reader once, as timm's MultiEpochsDataLoader does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.length = super().__len__()
        object.__setattr__(self, "batch_sampler", Endless(self.batch_sampler))
        self.reader = super().__iter__()

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        for _ in range(len(self)):
            yield next(self.reader)


class Stream(IterableDataset[Any]):
    """Deals itself out; shuffles anew in each epoch, which it counts, and draws noise."""

    def __init__(self) -> None:
        self.epochs = 0

    def __iter__(self) -> Any:
        part, parts = rt.data_part()
        order = list(range(SAMPLES))
        random.Random(self.epochs).shuffle(order)
        self.epochs += 1
        for number in order[part::parts]:
            yield torch.tensor([float(number), torch.rand(()).item(), random.random()])


class Deals(IterableDataset[Any]):
    """Draws its order, of all samples, with a global generator."""

    def __iter__(self) -> Any:
        part, parts = rt.data_part()
        for number in torch.randperm(SAMPLES).tolist()[part::parts]:
            yield torch.tensor([float(number), torch.rand(()).item()])


class Stateful(IterableDataset[Any]):
    """Deals itself out, in order, with noise; has a state."""

    def __init__(self) -> None:
        self.start = self.at = 0

    def __iter__(self) -> Any:
        part, parts = rt.data_part()
        begin, self.start = self.start or part, 0
        for number in range(begin, SAMPLES, parts):
            self.at = number + parts
            yield torch.tensor([float(number), torch.rand(()).item()])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["at"]


class OwnLoader:
    """No loader of torch's; has a state."""

    def __init__(self, batch: int) -> None:
        self.batch, self.start, self.at = batch, 0, 0

    def __iter__(self) -> Any:
        part, parts = rt.data_part()
        mine = range(part, SAMPLES, parts)
        begin, self.start = self.start, 0
        for at in range(begin, len(mine), self.batch):
            self.at = at + self.batch
            yield torch.tensor([[float(number)] for number in mine[at : at + self.batch]])

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["at"]


# ---------------------------------------------------------------- other libraries


def stateful(dataset: Any, batch: int, processes: int, **options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(dataset, batch_size=batch, num_workers=processes, **options)


def nodes(batch: int) -> Any:
    from torchdata import nodes

    sampler = DistributedSampler(range(SAMPLES), rt.world_size(), rt.rank(), shuffle=True)  # type: ignore[arg-type]
    batches = nodes.Batcher(nodes.SamplerWrapper(sampler), batch)  # type: ignore[arg-type]
    return nodes.Loader(nodes.Mapper(batches, torch.tensor))


def hugging_face(batch: int, processes: int = 0, buffer: int = 0, streamed: bool = True) -> Any:
    import datasets
    from datasets.distributed import split_dataset_by_node

    table: Any = datasets.Dataset.from_dict({"x": list(range(SAMPLES))})
    if not streamed:
        return DataLoader(table.with_format("torch"), batch, shuffle=True, num_workers=processes)
    table = table.to_iterable_dataset(num_shards=4)
    if buffer:
        table = table.shuffle(seed=1, buffer_size=buffer)
    mine = split_dataset_by_node(table, rank=rt.rank(), world_size=rt.world_size())
    return DataLoader(mine, batch, num_workers=processes)


def web(batch: int, folder: Path, processes: int = 0, shuffled: bool = False) -> Any:
    import webdataset

    shards = webdataset.WebDataset(
        f"{folder}/shard-{{0..3}}.tar", nodesplitter=webdataset.split_by_node, shardshuffle=False
    )
    rows = shards.map_dict(**{"x.pth": lambda data: torch.load(io.BytesIO(data))}).rename(x="x.pth", keep=False)
    if shuffled:
        rows = rows.shuffle(4, rng=random.Random(1)).compose(webdataset.detshuffle(4))
    return DataLoader(rows.map(lambda row: row["x"]), batch, num_workers=processes)


def web_shards(folder: Path) -> None:
    import webdataset

    for shard in range(4):
        with webdataset.TarWriter(f"{folder}/shard-{shard}.tar") as sink:
            for number in range(8 * shard, 8 * shard + 8):
                sink.write({"__key__": f"{number}", "x.pth": torch.tensor([number])})


def litdatas(batch: int, folder: Path, processes: int = 0) -> Any:
    import litdata

    dataset = litdata.StreamingDataset(f"{folder}/streamed", shuffle=True)
    return litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=processes)


def litdatas_chunks(folder: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    (folder / "streamed").mkdir()
    writer = BinaryWriter(f"{folder}/streamed", chunk_size=4)
    for number in range(SAMPLES):
        writer[number] = {"x": torch.tensor([number])}
    writer.done()
    writer.merge()


def mosaics(batch: int, folder: Path, processes: int = 0, plain: bool = False) -> Any:
    import streaming

    dataset = streaming.StreamingDataset(local=f"{folder}/mds", batch_size=batch, shuffle=True)
    kind = DataLoader if plain else streaming.StreamingDataLoader
    return kind(dataset, batch_size=batch, num_workers=processes)


def mosaics_shards(folder: Path) -> None:
    import streaming

    with streaming.MDSWriter(out=f"{folder}/mds", columns={"x": "int"}, size_limit=300) as out:
        for number in range(SAMPLES):
            out.write({"x": number})


def graphs(batch: int) -> Any:
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader

    edges = torch.tensor([[0, 1], [1, 0]])
    rows = [Data(x=torch.ones(2, 4), edge_index=edges, y=torch.tensor([number])) for number in range(SAMPLES)]
    return GraphLoader(rows, batch, shuffle=True)


def tensor_dict(batch: int) -> Any:
    from tensordict import TensorDict

    rows: Any = TensorDict({"x": torch.arange(SAMPLES)}, batch_size=[SAMPLES])
    return DataLoader(rows, batch, shuffle=True, collate_fn=lambda rows: rows)


def ray_dataset(batch: int, kept: bool) -> Any:
    import ray.data

    rows = ray.data.range(SAMPLES, override_num_blocks=4)
    return rt.RayDataset(rows, batch_size=batch, shuffle=True, keep_in_memory=kept)


# ---------------------------------------------------------------- the kinds


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes:
        make: Makes it for a batch size (and its files' folder): in each worker, or on the driver where it is Ray's.
        library: What has to be installed.
        prepare: Writes its files into a folder.
        times: How often each sample is to come in an epoch; None: as drawn.
        numbers: Which samples are in a batch.
        ray: It needs Ray.
    """

    make: Callable[..., Any]
    library: str = "torch"
    prepare: Callable[[Path], None] | None = None
    times: int | None = 1
    numbers: Callable[[Any], Any] = lambda batch: batch[:, 0] if isinstance(batch, torch.Tensor) else batch
    ray: bool = False

    @property
    def missing(self) -> bool:
        return importlib.util.find_spec(self.library) is None


def x(batch: Any) -> Any:
    return batch["x"]


def first(batch: Any) -> Any:
    return batch["a"][:, 0]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def of_batches() -> Any:
    return BatchSampler(RandomSampler(range(SAMPLES), generator=generator()), 4, False)


def by(sampler: Callable[[], Any], **options: Any) -> Kind:
    return Kind(lambda batch: DataLoader(Noisy(), batch, sampler=sampler(), **options))


def two(size: int, other: int, batch: int) -> dict[str, Any]:
    return {"a": DataLoader(Noisy(), size, shuffle=True), "b": DataLoader(range(other), batch, shuffle=True)}  # type: ignore[arg-type]


KINDS: dict[str, Kind] = {
    "shuffle=True": Kind(lambda batch: DataLoader(Noisy(), batch, shuffle=True)),
    "shuffle=True, 2 persistent processes": Kind(
        lambda batch: DataLoader(Noisy(), batch, shuffle=True, num_workers=2, persistent_workers=True)
    ),
    "SubsetRandomSampler(generator=)": by(lambda: SubsetRandomSampler(range(SAMPLES), generator())),
    "WeightedRandomSampler(generator=)": Kind(
        lambda batch: DataLoader(
            Noisy(), batch, sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES, generator=generator())
        ),
        times=None,
    ),
    "an own sampler, of the global generators": by(Unseeded),
    "an own sampler that shuffles in place": by(InPlace),
    "DistributedSampler": by(lambda: DistributedSampler(range(SAMPLES), rt.world_size(), rt.rank())),  # type: ignore[arg-type]
    "an own batch sampler, fewer batches in some epochs": Kind(
        lambda batch: DataLoader(Noisy(), batch_sampler=ByLength(batch))
    ),
    "batches as arrays, 2 processes": Kind(
        lambda batch: DataLoader(
            Noisy(),
            batch_sampler=ByLength(batch, numpy.array, varies=False),  # type: ignore[arg-type]
            num_workers=2,
        )
    ),
    "batch_size=None with a batch sampler, 2 processes": Kind(
        lambda batch: DataLoader(Noisy(), None, sampler=ByLength(batch, varies=False), num_workers=2)
    ),
    "a loader that reads ahead": Kind(lambda batch: ReadsAhead(Noisy(), batch, shuffle=True)),
    "a loader that shuffles batches": Kind(lambda batch: Mixes(Noisy(), batch, shuffle=True)),
    "a loader that gives each batch twice": Kind(lambda batch: Repeats(Noisy(), batch * 2, shuffle=True), times=2),
    "a loader that keeps its reader": Kind(lambda batch: Keeps(Noisy(), batch, shuffle=True)),
    "IterableDataset": Kind(lambda batch: DataLoader(Stream(), batch)),
    "IterableDataset, 2 processes": Kind(lambda batch: DataLoader(Stream(), batch, num_workers=2)),
    "IterableDataset that deals out what it shuffles": Kind(lambda batch: DataLoader(Deals(), batch)),
    "IterableDataset that deals out what it shuffles, 2 processes": Kind(
        lambda batch: DataLoader(Deals(), batch, num_workers=2)
    ),
    "IterableDataset with a state": Kind(lambda batch: DataLoader(Stateful(), batch)),
    "IterableDataset with a state, 2 processes": Kind(lambda batch: DataLoader(Stateful(), batch, num_workers=2)),
    "an own loader with a state": Kind(OwnLoader),
    "StatefulDataLoader": Kind(lambda batch: stateful(Noisy(), batch, 0, shuffle=True), "torchdata"),
    "StatefulDataLoader, 2 processes": Kind(lambda batch: stateful(Noisy(), batch, 2, shuffle=True), "torchdata"),
    "StatefulDataLoader of a stream, 2 processes": Kind(lambda batch: stateful(Stateful(), batch, 2), "torchdata"),
    "torchdata.nodes": Kind(nodes, "torchdata", numbers=lambda batch: batch),
    "Hugging Face Dataset": Kind(lambda batch: hugging_face(batch, streamed=False), "datasets", numbers=x),
    "Hugging Face IterableDataset": Kind(hugging_face, "datasets", numbers=x),
    "Hugging Face IterableDataset, 2 processes": Kind(lambda batch: hugging_face(batch, 2), "datasets", numbers=x),
    "Hugging Face, shuffle buffer": Kind(lambda batch: hugging_face(batch, buffer=8), "datasets", numbers=x),
    "Hugging Face, shuffle buffer, 2 processes": Kind(
        lambda batch: hugging_face(batch, 2, buffer=8), "datasets", numbers=x
    ),
    "WebDataset": Kind(web, "webdataset", web_shards),
    "WebDataset, 2 processes": Kind(lambda batch, folder: web(batch, folder, 2), "webdataset", web_shards),
    "WebDataset, shuffled, 2 processes": Kind(
        lambda batch, folder: web(batch, folder, 2, shuffled=True), "webdataset", web_shards
    ),
    "litdata": Kind(litdatas, "litdata", litdatas_chunks, numbers=x),
    "litdata, 2 processes": Kind(
        lambda batch, folder: litdatas(batch, folder, 2), "litdata", litdatas_chunks, numbers=x
    ),
    "mosaicml-streaming": Kind(mosaics, "streaming", mosaics_shards, numbers=x),
    "mosaicml-streaming, 2 processes": Kind(
        lambda batch, folder: mosaics(batch, folder, 2), "streaming", mosaics_shards, numbers=x
    ),
    "mosaicml-streaming in torch's DataLoader": Kind(
        lambda batch, folder: mosaics(batch, folder, plain=True), "streaming", mosaics_shards, numbers=x
    ),
    "PyTorch Geometric": Kind(graphs, "torch_geometric", numbers=lambda batch: batch.y),
    "TensorDict": Kind(tensor_dict, "tensordict", numbers=x),
    "two loaders, max_size_cycle": Kind(lambda batch: two(batch, 8, batch // 2), numbers=first),
    "two loaders, min_size": Kind(
        lambda batch: rt.CombinedLoader(two(batch // 2, 16, batch // 2), "min_size"), times=None, numbers=first
    ),
    "RayDataset, kept": Kind(lambda batch: ray_dataset(batch, True), numbers=lambda batch: batch["id"], ray=True),
    "RayDataset, streamed": Kind(lambda batch: ray_dataset(batch, False), numbers=lambda batch: batch["id"], ray=True),
}


# ---------------------------------------------------------------- measuring


class Data(rt.DataModule):
    def __init__(self, kind: str, batch: int, folder: Path) -> None:
        super().__init__()
        self.kind, self.batch, self.folder = kind, batch, folder

    def train_dataloader(self) -> Any:
        kind = KINDS[self.kind]
        return kind.make(self.batch) if kind.prepare is None else kind.make(self.batch, self.folder)


def plain(batch: Any) -> Any:
    """All that is in a batch, as lists and numbers."""
    if hasattr(batch, "keys"):
        return {str(name): plain(batch[name]) for name in sorted(batch.keys())}
    if hasattr(batch, "tolist"):
        return batch.tolist()
    return [plain(item) for item in batch] if isinstance(batch, (list, tuple)) else batch


class Tells(rt.Module):
    """Writes down what each worker gets: (epoch, batch, samples, all of it)."""

    def __init__(self, kind: str, folder: Path) -> None:
        super().__init__()
        self.kind, self.folder = kind, str(folder)
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        numbers = [int(number) for number in KINDS[self.kind].numbers(batch)]
        with open(f"{self.folder}/{self.global_rank}", "a") as file:
            file.write(f"{(self.current_epoch, batch_idx, numbers, plain(batch))!r}\n")
        return (self.weight - torch.rand(1)).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


@dataclass(frozen=True)
class Row:
    """What a kind of source came to.

    Attributes:
        once: In each epoch, each sample came as often as it should.
        resumed: By place: workers read the same batches from there on as the undisturbed run, noise included, and
            weights end the same.
    """

    once: bool
    resumed: dict[int, bool]


def measure(
    name: str, workers: int, folder: Path, trainer: Callable[..., rt.Trainer], places: tuple[int, ...] = PLACES
) -> Row:
    """Fit, and fit again from each of `places`, where the steps of the run have one.

    Args:
        name: Of the kind.
        workers: 1 for this process, 2 for two.
        folder: An empty one for logs and checkpoints.
        trainer: Makes quiet Trainers over so many workers.
        places: Steps.
    """
    kind = KINDS[name]
    batch = 4 // workers

    def fit(part: str, **options: Any) -> tuple[Tells, list[list[Any]], rt.Trainer]:
        (folder / part).mkdir()
        module, path = Tells(name, folder / part), options.pop("ckpt_path", None)
        made = trainer(max_epochs=EPOCHS, seed=3, **options)
        data = {"train_dataloaders": kind.make(batch)} if kind.ray else {"datamodule": Data(name, batch, folder)}
        made.fit(module, **data, ckpt_path=path)
        lines = [Path(folder, part, str(rank)).read_text().splitlines() for rank in range(workers)]
        return module, [[ast.literal_eval(line) for line in each] for each in lines], made

    if kind.prepare is not None:
        kind.prepare(folder)
    saved = folder / "checkpoints"
    within = [place for place in places if place != END]
    when: list[dict[str, int]] = [{"every_n_train_steps": math.gcd(*within)}] if within else []
    when += [{"every_n_epochs": 1}] if END in places else []
    callbacks = [rt.ModelCheckpoint(saved, save_top_k=-1, filename="{step}", **each) for each in when]
    module, read, _ = fit("whole", callbacks=callbacks, enable_checkpointing=True)
    epochs = [[row for rows in read for row in rows if row[0] == epoch] for epoch in range(EPOCHS)]
    wanted = sorted(list(range(SAMPLES)) * (kind.times or 0))
    came = [sorted(number for row in epoch for number in row[2]) for epoch in epochs]
    resumed = {}
    for place in places:
        again, rest, _ = fit(f"from {place}", ckpt_path=saved / f"step={place}.ckpt")
        resumed[place] = rest == [rows[place:] for rows in read] and torch.equal(module.weight, again.weight)
    return Row(kind.times is None or came == [wanted] * EPOCHS, resumed)


def main() -> None:
    from forked_group import ForkedGroups

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression for the names of kinds")
    parser.add_argument("--ray", action="store_true", help="over Ray workers; without, over forked ones")
    options = parser.parse_args()
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    groups, began = ForkedGroups(), time.perf_counter()
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])  # Ray's workers'
    if options.ray:
        import ray

        ray.init("local", num_cpus=4, include_dashboard=False)  # one CPU for data beside the workers', at least
    else:
        groups.take_the_place_of_rays(setattr)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    print("| source | each sample once | resumed, in process | resumed, on two workers |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for name, kind in KINDS.items():
            if not re.search(options.only, name) or kind.missing or (kind.ray and not options.ray):
                continue
            cells = ["drawn" if kind.times is None else "yes"]
            for workers in (1, 2):
                folder = Path(root, f"{len(list(Path(root).iterdir()))}")
                folder.mkdir()
                where = {"strategy": "local"} if workers == 1 else {"strategy": "ddp", "num_processes": 2}
                make = functools.partial(rt.Trainer, **{"enable_checkpointing": False, **quiet, **where})
                try:
                    row = measure(name, workers, folder, make)
                except Exception as error:  # the others go on
                    cells.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
                    continue
                cells[0] = cells[0] if row.once else "NO"
                odd = [str(place) for place, same in row.resumed.items() if not same]
                cells.append(f"NOT from {', '.join(odd)}" if odd else f"equal from {len(row.resumed)} places")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    groups.close()
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    import kinds_of_sources  # by its name, as workers know it

    kinds_of_sources.main()
