"""Ray Datasets into workers: each row once, in a repeatable order, from files made here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray_models import eventually
from torch import Tensor

import raytrainer
from raytrainer import DataModule, Module, RayDataset, Trainer, WorkerCallback
from raytrainer.callbacks import Callback, ModelCheckpoint
from raytrainer.data.ray import spare_splitters
from raytrainer.driver.cluster.session import free_resources
from raytrainer.private import ray_private

ROWS = 1000
DIM = 4

Make = Callable[..., Trainer]


@pytest.fixture
def rays(ray_session: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`ray.data`, without its progress bars; it reads Parquet in the older way, which starts no actors for footers."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    monkeypatch.setattr(context, "use_datasource_v2", False, raising=False)
    return ray.data


@pytest.fixture
def ray_trainer(ray_trainer: Make) -> Make:
    """Trainers that begin when tasks of earlier runs have ended: where these hold every CPU, idle workers give way."""

    def make(**options: Any) -> Trainer:
        eventually(lambda: free_resources("CPU") >= 1, "a CPU is free")
        return ray_trainer(**options)

    return make


@pytest.fixture
def footers(rays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet is read in the default way."""
    monkeypatch.setattr(rays.DataContext.get_current(), "use_datasource_v2", True, raising=False)


def table(start: int, stop: int) -> pa.Table:
    ids = np.arange(start, stop)
    vectors = np.repeat(ids[:, None], DIM, 1).astype(np.float32)
    return pa.table({"id": ids, "x": pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), DIM)})


@pytest.fixture(scope="session")  # tests of this module do not all follow each other
def parquet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three files of uneven size, several row groups each."""
    folder = tmp_path_factory.mktemp("parquet")
    for i, (start, stop) in enumerate([(0, 401), (401, 500), (500, ROWS)]):
        pa.parquet.write_table(table(start, stop), folder / f"{i}.parquet", row_group_size=57)
    return str(folder)


class Recorder(WorkerCallback):
    """Writes which rows each worker trained on, batch by batch and epoch by epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.epochs: list[list[list[int]]] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.epochs.append([])

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.epochs:  # the run goes on within an epoch
            self.epochs.append([])
        self.epochs[-1].append(batch["id"].tolist())

    def on_train_end(self, trainer: Any, module: Any) -> None:
        torch.save(self.epochs, f"{self.folder}/rank{trainer.global_rank}.pt")


def recorded(folder: Path, workers: int) -> list[list[list[list[int]]]]:
    """Row ids by epoch, worker and batch."""
    by_worker = [torch.load(folder / f"rank{rank}.pt") for rank in range(workers)]
    return [list(epoch) for epoch in zip(*by_worker, strict=True)]


def flat(nested: Any) -> list[int]:
    return [row for item in nested for row in flat(item)] if isinstance(nested, list) else [nested]


class Net(Module):
    """Trains a little, and adds up what it is given to validate."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(DIM, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.layer(batch["x"])  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert batch["x"].shape == (len(batch["id"]), DIM) and batch["x"].device == self.device
        assert batch["x"][:, 0].equal(batch["id"].to(batch["x"].dtype))
        return self(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("rows", float(len(batch["id"])), reduce_fx="sum")
        self.log("ids", batch["id"].sum().double(), reduce_fx="sum")

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def trained(make: Make, tmp_path: Path, data: Any, workers: int = 2, **options: Any) -> Any:
    """Row ids by epoch, worker and batch of a fit of two epochs."""
    tmp_path.mkdir(exist_ok=True)
    options = {"max_epochs": 2, "seed": 5, "callbacks": [Recorder(tmp_path)], **options}
    trainer = make(num_processes=workers, **options)
    trainer.fit(Net(), data)
    return recorded(tmp_path, workers)


Way = tuple[bool, bool, "bool | int", int]


@pytest.fixture(scope="session")
def seen() -> dict[Way, Any]:
    """What has been read in which way."""
    return {}


@pytest.fixture
def read(
    ray_trainer: Make, rays: Any, parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: dict[Way, Any]
) -> Callable[..., Any]:
    """Row ids of two epochs read in one of `WAYS`, in batches of 16; once for all tests, unless told `again`."""

    def run(way: Way, again: bool = False, **options: Any) -> Any:
        if again or options or way not in seen:
            data, workers = dataset(rays, parquet, monkeypatch, way), way[3]
            found = trained(ray_trainer, tmp_path / f"run{len(list(tmp_path.iterdir()))}", data, workers, **options)
            if again or options:
                return found
            seen[way] = found
        return seen[way]

    return run


def dataset(rays: Any, parquet: str, monkeypatch: pytest.MonkeyPatch, way: Way) -> RayDataset:
    footers, keep, shuffle, _ = way
    monkeypatch.setattr(rays.DataContext.get_current(), "use_datasource_v2", footers, raising=False)
    return RayDataset(rays.read_parquet(parquet), batch_size=16, shuffle=shuffle, keep_in_memory=keep)


#: The ways of reading: in the default way, with footers, or the older one, which takes less time; kept or executed in
#: each epoch; how shuffled; by how many workers.
WAYS: list[Way] = [
    (True, True, False, 2), (False, True, True, 2), (False, True, 100, 2),
    (False, False, False, 2), (False, False, True, 2), (True, False, 100, 2),
    (True, True, 100, 1), (False, True, True, 3), (True, False, 100, 3),
]  # fmt: skip


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.late(way[3])] if way[3] != 2 else []) for way in WAYS], ids=str
)
def test_each_row_reaches_one_worker(read: Callable[..., Any], way: Way) -> None:
    epochs = read(way)
    for epoch in epochs:
        assert sorted(flat(epoch)) == list(range(ROWS))
        assert len({len(batches) for batches in epoch}) == 1  # all workers have equally many
        assert all(len(batch) == 16 for batches in epoch for batch in batches[:-2])
    assert (epochs[0] == epochs[1]) == (way[2] is False)


@pytest.mark.sample(0)
@pytest.mark.parametrize("way", [(False, True, True, 2), (True, False, 100, 2)], ids=["kept", "streamed"])
def test_same_seed_same_order(read: Callable[..., Any], way: Way) -> None:
    first = read(way)
    assert first == read(way, again=True)
    assert first[:1] != read(way, seed=2, max_epochs=1)


def test_full_shuffle_of_a_stream_repeats(read: Callable[..., Any]) -> None:
    way = (False, False, True, 2)
    assert read(way)[:1] == read(way, max_epochs=1)


@pytest.mark.sample(1)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "streamed"])
def test_drop_last(ray_trainer: Make, rays: Any, parquet: str, tmp_path: Path, keep: bool) -> None:
    data = RayDataset(rays.read_parquet(parquet), batch_size=64, drop_last=True, keep_in_memory=keep)
    for epoch in trained(ray_trainer, tmp_path, data):
        assert [len(batch) for batches in epoch for batch in batches] == [64] * 14
        assert len(set(flat(epoch))) == 14 * 64


@pytest.mark.sample(1)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "streamed"])
def test_a_second_run_with_the_same_dataset(
    ray_trainer: Make, rays: Any, footers: None, tmp_path: Path, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are listed, and kept blocks read, once; unless they have changed."""
    listings = []
    listed_once = ray_private.listed_once
    monkeypatch.setattr(ray_private, "listed_once", lambda data: listings.append(1) or listed_once(data))
    files = tmp_path / "files"
    files.mkdir()
    pa.parquet.write_table(table(0, 200), files / "0.parquet", row_group_size=57)
    data = RayDataset(rays.read_parquet(str(files)), batch_size=16, shuffle=True, keep_in_memory=keep)
    first, second = (trained(ray_trainer, tmp_path / name, data) for name in ("first", "second"))
    assert first == second and sorted(flat(first[0])) == list(range(200))
    if ray.__version__.startswith("2.48."):  # it says nothing of its files, which are listed anew
        return
    assert len(listings) == 1
    pa.parquet.write_table(table(0, 300), files / "0.parquet", row_group_size=57)
    third = trained(ray_trainer, tmp_path / "third", data)
    assert len(listings) == 2
    assert sorted(flat(third[0])) == list(range(300))


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "streamed"])
def test_evaluation_counts_each_row_once(ray_trainer: Make, rays: Any, parquet: str, keep: bool) -> None:
    data = [RayDataset(rays.read_parquet(parquet), batch_size=96, keep_in_memory=keep)]
    data.append(RayDataset(rays.from_arrow(table(0, 2)), batch_size=96))  # fewer rows than workers
    found = ray_trainer().validate(Net(), data, verbose=False)
    rows = [{name.split("/")[0]: value for name, value in one.items()} for one in found]
    assert rows == [{"rows": ROWS, "ids": sum(range(ROWS))}, {"rows": 2, "ids": 1}]


def test_validation_within_fit_and_early_ends(ray_trainer: Make, rays: Any, parquet: str) -> None:
    """Limits, max_steps and validation in mid-epoch leave nothing hanging; the next epoch begins at once."""
    dataset = rays.read_parquet(parquet)
    for keep in (True, False):
        net = Net()
        train = RayDataset(dataset, batch_size=16, shuffle=50, keep_in_memory=keep)
        val = RayDataset(dataset, batch_size=100, keep_in_memory=keep)
        trainer = ray_trainer(max_epochs=2, limit_train_batches=5, val_check_interval=2)
        trainer.fit(net, train, val)
        assert trainer.global_step == 10
        assert trainer.callback_metrics["rows"] == ROWS
        trainer = ray_trainer(max_steps=36, limit_val_batches=1, val_check_interval=15)
        trainer.fit(net, train, val)
        assert trainer.global_step == 36
        assert trainer.callback_metrics["rows"] == 200


class StopAt(Callback):
    """Asks for the end, by epoch."""

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        trainer.should_stop = True


def test_early_stop(ray_trainer: Make, rays: Any, parquet: str) -> None:
    trainer = ray_trainer(max_epochs=9, callbacks=[StopAt()])
    trainer.fit(Net(), RayDataset(rays.read_parquet(parquet), batch_size=16, keep_in_memory=False))
    assert trainer.current_epoch == 1


class KillSplitter(Callback):
    """Ends the process that executes the dataset, once."""

    every_n_train_steps = 1

    def __init__(self, splitters: list[Any]) -> None:
        self.splitters = splitters

    def on_train_chunk_end(self, trainer: Trainer, module: Any, report: Any) -> None:
        if trainer.global_step == 20 and len(self.splitters) == 1:
            ray.kill(self.splitters[0])


def test_a_lost_splitter_is_replaced(
    ray_trainer: Make, rays: Any, parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    read: Callable[..., Any],
) -> None:  # fmt: skip
    splitters: list[Any] = []
    new = spare_splitters.new
    monkeypatch.setattr(spare_splitters, "new", lambda *args: splitters.append(new(*args)) or splitters[-1])
    spare_splitters.forget()
    way = (False, False, True, 2)
    # without a snapshot it goes on from the beginning
    options = {"callbacks": [Recorder(tmp_path), KillSplitter(splitters)], "max_failures": 1, "snapshot_every": 1000}
    found = trained(ray_trainer, tmp_path, dataset(rays, parquet, monkeypatch, way), **options)
    assert len(splitters) == 2
    assert found == read(way)
    imported = splitters[1].__ray_call__.remote(lambda splitter: "torch" in sys.modules)
    assert not ray.get(imported)


@pytest.mark.usefixtures("footers")
def test_epoch_length(ray_trainer: Make, rays: Any, parquet: str) -> None:
    """Known from Parquet footers, unknown after a function that may change the number of rows."""
    trainer = ray_trainer(max_epochs=1)
    trainer.fit(Net(), RayDataset(rays.read_parquet(parquet), batch_size=16, keep_in_memory=False))
    assert trainer.num_training_batches == 32
    mapped = rays.read_parquet(parquet).map_batches(lambda t: t.slice(0, len(t) // 2), batch_format="pyarrow")
    trainer.fit(Net(), RayDataset(mapped, batch_size=16))
    assert trainer.num_training_batches is None
    assert 0 < trainer.global_step <= 17


class Data(DataModule):
    """Everything from the driver's hooks."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.asked: list[str] = []

    def _dataset(self, stage: str) -> RayDataset:
        import ray.data

        self.asked.append(stage)
        return RayDataset(ray.data.read_parquet(self.folder), batch_size=50, shuffle=True)

    def train_dataset(self) -> RayDataset:
        return self._dataset("train")

    def val_dataset(self) -> RayDataset:
        return self._dataset("val")

    def test_dataset(self) -> list[RayDataset]:
        return [self._dataset("test"), self._dataset("test")]

    def predict_dataset(self) -> RayDataset:
        return self._dataset("predict")


@pytest.mark.sample(0)
@pytest.mark.usefixtures("rays")
def test_hooks_of_a_datamodule(ray_trainer: Make, parquet: str) -> None:
    data, trainer, net = Data(parquet), ray_trainer(max_epochs=1), Net()
    trainer.fit(net, datamodule=data)
    assert trainer.callback_metrics["rows"] == ROWS
    tested = trainer.test(net, datamodule=data, verbose=False)
    assert [result[f"rows/dataloader_idx_{i}"] for i, result in enumerate(tested)] == [ROWS, ROWS]
    predicted = trainer.predict(net, datamodule=data)
    assert predicted.count() == ROWS
    assert data.asked == ["train", "val", "test", "test", "predict"]  # on the driver


@pytest.mark.sample(1)
@pytest.mark.usefixtures("footers")
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "streamed"])
def test_in_the_drivers_process(one_process: Make, rays: Any, parquet: str, tmp_path: Path, keep: bool) -> None:
    data = RayDataset(rays.read_parquet(parquet), batch_size=16, shuffle=64, keep_in_memory=keep)
    trainer = one_process(max_epochs=2, seed=5, callbacks=[Recorder(tmp_path)])
    trainer.fit(Net(), data, data)
    for epoch in recorded(tmp_path, 1):
        assert sorted(flat(epoch)) == list(range(ROWS))
    assert trainer.callback_metrics["rows"] == ROWS


class KillAt(Callback):
    """Ends the run as a failure would, in the middle of an epoch."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    every_n_train_steps = 1

    def on_train_chunk_end(self, trainer: Trainer, module: Any, report: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("killed")


@pytest.mark.sample(0)
@pytest.mark.parametrize("way", [(False, True, 100, 2), (True, False, 100, 2)], ids=["kept", "streamed"])
def test_going_on_in_mid_epoch(
    ray_trainer: Make, rays: Any, parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    read: Callable[..., Any], way: Way,
) -> None:  # fmt: skip
    whole = read(way)
    data = dataset(rays, parquet, monkeypatch, way)
    path = tmp_path / "mid.ckpt"
    with pytest.raises(RuntimeError, match="killed"):
        ray_trainer(max_epochs=2, seed=5, callbacks=[KillAt(7, path)]).fit(Net(), data)
    resumed = ray_trainer(max_epochs=2, seed=5, callbacks=[Recorder(tmp_path)])
    resumed.fit(Net(), data, ckpt_path=path)
    first, second = recorded(tmp_path, 2)
    assert first == [batches[7:] for batches in whole[0]]
    assert second == whole[1]


Stopped = Callable[[Make, bool], tuple[Path, list[int]]]


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory, parquet: str) -> Stopped:
    """Trains two workers for seven steps, within a window, once for each kind of dataset: checkpoint, and rows seen."""
    known: dict[bool, tuple[Path, list[int]]] = {}

    def stop(make: Make, keep: bool) -> tuple[Path, list[int]]:
        if keep not in known:
            folder = tmp_path_factory.mktemp("stopped")
            saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
            trainer = make(max_steps=7, seed=5, callbacks=[Recorder(folder), saver])
            trainer.fit(Net(), windowed(parquet, keep))
            (epoch,) = recorded(folder, 2)
            assert [len(batches) for batches in epoch] == [7, 7]
            known[keep] = folder / "last.ckpt", flat(epoch)
        return known[keep]

    return stop


def windowed(parquet: str, keep: bool) -> RayDataset:
    import ray.data

    return RayDataset(ray.data.read_parquet(parquet), batch_size=20, shuffle=100, keep_in_memory=keep)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "workers", [2, pytest.param(3, marks=pytest.mark.late(3))], ids=lambda number: f"{number} workers"
)
def test_going_on_within_a_window(
    ray_trainer: Make, rays: Any, parquet: str, tmp_path: Path, stopped: Stopped, workers: int
) -> None:
    """Also with another number of workers: every row once, whoever has read it."""
    begun = {keep: stopped(ray_trainer, keep) for keep in (True, False)}
    for keep, (path, rows) in begun.items():
        trainer = ray_trainer(num_processes=workers, seed=5, callbacks=[Recorder(tmp_path)], max_epochs=1)
        trainer.fit(Net(), windowed(parquet, keep), ckpt_path=str(path))
        (epoch,) = recorded(tmp_path, workers)
        assert sorted(rows + flat(epoch)) == list(range(ROWS))


# ---------------------------------------------------------------- formats


def test_csv_and_types(ray_trainer: Make, rays: Any, tmp_path: Path) -> None:
    pa.csv.write_csv(pa.table({"id": range(30), "a": np.arange(30) + 0.5, "word": ["w"] * 30}), tmp_path / "t.csv")

    class Columns(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert set(batch) == {"id", "a"}
            assert batch["a"].dtype == torch.float32 and batch["id"].dtype == torch.int64
            return self.layer(batch["a"][:, None].expand(-1, DIM)).mean()

    dataset = rays.read_csv(str(tmp_path / "t.csv"))
    for keep in (True, False):
        data = RayDataset(dataset, batch_size=4, columns=["id", "a"], dtypes=torch.float32, keep_in_memory=keep)
        ray_trainer(max_epochs=1).fit(Columns(), data)
    with pytest.raises(raytrainer.DataError, match="'word' holds"):
        ray_trainer(max_epochs=1).fit(Net(), RayDataset(dataset))
    with pytest.raises(raytrainer.DataError, match="no \\['other'\\]"):
        ray_trainer(max_epochs=1).fit(Net(), RayDataset(dataset.materialize(), columns=["other"]))


def test_images_of_one_size_and_of_many(ray_trainer: Make, rays: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for i in range(12):
        image.fromarray(np.full((6 + i % 3, 8, 3), i, np.uint8)).save(tmp_path / f"{i:02}.png")

    class Pixels(Module):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("sum", batch.double().sum(), reduce_fx="sum")

    def collate(columns: dict[str, Any]) -> Tensor:
        return torch.tensor([float(picture.mean()) for picture in columns["image"]])

    one_size = RayDataset(rays.read_images(str(tmp_path), size=(6, 8)), batch_size=5, collate_fn=collate)
    many = RayDataset(rays.read_images(str(tmp_path)), batch_size=5, collate_fn=collate)
    for data in (one_size, many):
        assert ray_trainer().validate(Pixels(), data, verbose=False) == [{"sum": sum(range(12))}]
    tensors = RayDataset(rays.read_images(str(tmp_path), size=(6, 8)), batch_size=5)

    class Shapes(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert batch["image"].shape[1:] == (6, 8, 3) and batch["image"].dtype == torch.uint8

    ray_trainer().validate(Shapes(), tensors, verbose=False)
    with pytest.raises(raytrainer.DataError, match="varying shape"):
        ray_trainer().validate(Shapes(), RayDataset(rays.read_images(str(tmp_path)), batch_size=5), verbose=False)


def test_slow_columns_are_named(one_process: Make, rays: Any, caplog: Any, capsys: Any) -> None:
    lists = rays.from_arrow(pa.table({"id": range(8), "x": [[1.0] * DIM] * 8}))
    one_process().validate(Net(), RayDataset(lists, batch_size=4), verbose=False)
    wide = rays.from_arrow(pa.table({"id": range(8), **{f"c{i}": [0.0] * 8 for i in range(70)}}))
    one_process().validate(Net(), RayDataset(wide, batch_size=4), verbose=False)
    said = capsys.readouterr().err
    assert "column(s) x hold variable-size lists" in said
    assert "71 columns of single numbers" in said


# ---------------------------------------------------------------- prediction


class Labels(Net):
    def __init__(self, flag: Path) -> None:
        super().__init__()
        self.flag = flag

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        self.flag.touch()
        assert not self.training and torch.is_inference_mode_enabled()
        return {"y": self(batch), "twice": batch["id"] * 2}


@pytest.mark.late(1.5)  # what predicts takes the place of the two
def test_predict_is_lazy_and_in_step(ray_trainer: Make, rays: Any, parquet: str, tmp_path: Path) -> None:
    net, trainer = Labels(tmp_path / "flag"), ray_trainer()
    predicted = trainer.predict(net, RayDataset(rays.read_parquet(parquet), batch_size=64))
    assert not net.flag.exists()
    predicted.write_parquet(str(tmp_path / "out"))
    rows = rays.read_parquet(str(tmp_path / "out")).to_pandas().sort_values("id")
    assert rows["id"].tolist() == list(range(ROWS))
    assert (rows["twice"] == 2 * rows["id"]).all()
    with torch.no_grad():
        expected = net.layer(torch.arange(float(ROWS))[:, None].expand(-1, DIM))
    assert torch.allclose(torch.tensor(np.stack(rows["y"].tolist())), expected, atol=1e-3)
    limited = ray_trainer(num_processes=1, limit_predict_batches=2).predict(net, rays.read_parquet(parquet))
    assert limited.count() == 512


# ---------------------------------------------------------------- errors


def test_workers_that_take_every_cpu(
    ray_trainer: Make, rays: Any, parquet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session's Ray has four CPUs, of which two are somebody else's here, as if there were no more."""
    blocks, trainer = rays.from_arrow(table(0, 64)).materialize(), ray_trainer(max_epochs=1)
    with pytest.raises(raytrainer.ResourceError, match=r"4 worker\(s\) take every CPU .* ray.init\(num_cpus=5\)"):
        ray_trainer(num_processes=4).fit(Net(), rays.read_parquet(parquet))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(raytrainer.ResourceError, match=r"2 worker\(s\) take every CPU .* ray.init\(num_cpus=3\)"):
        trainer.fit(Net(), rays.read_parquet(parquet))
    held = placement_group([{"CPU": 2}])
    try:
        assert held.wait(60)
        trainer.fit(Net(), blocks)  # which exist, and need no task to read them
        assert trainer.state.finished
        eventually(lambda: free_resources("CPU") == 0, "no CPU was left for tasks")
    finally:
        remove_placement_group(held)


def test_an_error_in_the_pipeline_arrives(ray_trainer: Make, rays: Any, parquet: str) -> None:
    def fail(batch: Any) -> Any:
        raise ZeroDivisionError("in the pipeline")

    with pytest.raises(Exception, match="in the pipeline"):
        ray_trainer(max_epochs=1).fit(Net(), rays.read_parquet(parquet).map_batches(fail))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"shuffle": 1}, "shuffle=1: give True, False or a window"),
        ({"columns": "x"}, "columns='x'"),
        ({"columns": []}, "columns="),
        ({"dtypes": "float32"}, "'float32' is no torch.dtype"),
        ({"collate_fn": 3}, "collate_fn=3"),
        ({"prefetch_batches": -1}, "prefetch_batches=-1"),
    ],
)
def test_values_are_checked(rays: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(raytrainer.ConfigurationError, match=words):
        RayDataset(rays.range(3), **options)


def test_no_dataset_or_two_answers(rays: Any, ray_trainer: Make) -> None:
    with pytest.raises(raytrainer.ConfigurationError, match=r"give a ray.data.Dataset"):
        RayDataset([1, 2])

    class Both(Net):
        def train_dataset(self) -> Any:
            return rays.range(3)

        def train_dataloader(self) -> Any:
            return []

    with pytest.raises(raytrainer.ConfigurationError, match="write one of them"):
        ray_trainer(max_epochs=1).fit(Both())


def test_fewer_rows_than_workers(rays: Any, ray_trainer: Make) -> None:
    with pytest.raises(raytrainer.DataError, match="no batch for each of 2"):
        ray_trainer(max_epochs=1).fit(Net(), RayDataset(rays.from_arrow(table(0, 1))))
