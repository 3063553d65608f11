"""Errors of user code on workers reach the driver at once, as what they are; the next run works."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from ray_models import Net, Where, alive, eventually, loader, moved, table
from torch.utils.data import DataLoader, Dataset

from raytrainer import DataModule, Module, WorkerError, WorkerLostError
from raytrainer.driver.workers import ray_answers
from raytrainer.errors import SerializationError
from raytrainer.tracebacks import HINT


def check_next_fit(make_trainer) -> None:
    module = Net()
    make_trainer(max_epochs=1).fit(module, loader(16, 4))
    assert moved(Net(), module)


def failing_fit(make_trainer, module, expected, data=None, **options):
    """The exception of a fit that fails, and its cause."""
    with pytest.raises(expected) as caught:
        make_trainer(**{"max_epochs": 1, **options}).fit(module, loader(16, 4) if data is None else data)
    return caught.value, caught.value.__cause__


def test_one_rank_fails_while_the_other_waits_for_it(ray_trainer):
    class OneFails(Net):
        def training_step(self, batch, batch_idx):
            if self.global_rank == 1 and batch_idx == 1:
                raise ValueError("label out of range")  # the line that users look for
            return super().training_step(batch, batch_idx)

    trainer = ray_trainer(max_epochs=1)
    with pytest.raises(ValueError, match="label out of range") as caught:
        trainer.fit(OneFails(), loader(16, 4))
    where = caught.value.__cause__
    assert isinstance(where, WorkerError)
    assert where.rank == 1 and where.node.split()[0] not in ("", "?")
    assert "# the line that users look for" in where.traceback and "test_ray_errors.py" in where.traceback
    assert HINT not in where.traceback and getattr(caught.value, "__notes__", []).count(HINT) <= 1  # said once
    assert "rank 1" in str(where)
    assert trainer.state.status == "failed" and not trainer.interrupted
    check_next_fit(ray_trainer)


def test_all_ranks_fail_and_stay(all_are_heard, ray_trainer, tmp_path):
    class AllFail(Where):
        def training_step(self, batch, batch_idx):
            raise KeyError("missing")

    module, well = AllFail(tmp_path / "where"), Where(tmp_path / "where")
    _, where = failing_fit(ray_trainer, module, KeyError)
    assert where.rank == 0
    pids = module.taken()
    ray_trainer(max_epochs=1).fit(well, loader(16, 4))
    assert well.taken() == pids


class Local(Exception):
    """Needs two arguments, so that pickle cannot rebuild it from its message."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")


class Locked(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


@pytest.mark.parametrize("error", ["Local", "Locked"])
def test_an_exception_that_cannot_be_pickled(error, ray_trainer):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            raise {"Local": lambda: Local(3, "odd"), "Locked": lambda: Locked("odd")}[error]()

    caught, _ = failing_fit(ray_trainer, Fails(), WorkerError)
    assert error in caught.traceback and "odd" in caught.traceback
    check_next_fit(ray_trainer)


@pytest.fixture
def all_are_heard(monkeypatch):
    """Where all fail alike, however slow the machine is: the others of one that has failed have time to answer."""
    monkeypatch.setattr(ray_answers, "GRACE", 60.0)


HOOKS = ["setup", "configure_model", "configure_optimizers", "on_fit_start", "on_train_start", "validation_step",
         "on_validation_epoch_end", "on_train_epoch_end", "on_train_end", "teardown"]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
def test_errors_in_hooks(hook, ray_trainer):
    """On all ranks, which then are kept."""

    class Fails(Net):
        pass

    def fail(self, *args):
        raise ValueError(f"in {hook}")

    setattr(Fails, hook, fail)

    class Data(DataModule):
        def train_dataloader(self):
            return loader(16, 4)

        val_dataloader = train_dataloader

    caught, where = failing_fit(ray_trainer, Fails(), ValueError, Data())
    assert str(caught) == f"in {hook}" and "in fail" in where.traceback
    check_next_fit(ray_trainer)


def test_errors_in_prepare_data(ray_trainer):
    class Data(DataModule):
        def prepare_data(self):
            raise OSError("disk full")

        def train_dataloader(self):
            return loader(16, 4)

    _, where = failing_fit(ray_trainer, Net(), OSError, Data())
    assert where.rank == 0
    check_next_fit(ray_trainer)


class Broken(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index in (8, 9):  # one for each worker
            raise ConnectionResetError("connection reset by peer while reading a sample")
        return table(16)[index]


def test_errors_in_a_loaders_process(ray_trainer):
    """Also one that sounds as if a worker had been lost."""
    for processes in (1, 0):
        caught, where = failing_fit(
            ray_trainer, Net(), ConnectionResetError, DataLoader(Broken(), 4, num_workers=processes)
        )
        assert "reading a sample" in str(caught) and "__getitem__" in where.traceback
    check_next_fit(ray_trainer)


def test_errors_in_evaluation(ray_trainer):
    class Fails(Net):
        def test_step(self, batch, batch_idx):
            raise ValueError("in test")

        def predict_step(self, batch, batch_idx):
            if self.global_rank:
                raise ValueError("in predict")

    trainer = ray_trainer()
    with pytest.raises(ValueError, match="in test"):
        trainer.test(Fails(), loader(16, 4))
    with pytest.raises(ValueError, match="in predict") as caught:
        trainer.predict(Fails(), loader(16, 4))
    assert caught.value.__cause__.rank == 1
    check_next_fit(ray_trainer)


def test_errors_of_the_drivers_callbacks(ray_trainer):
    from raytrainer import Callback

    class Fails(Callback):
        def on_train_epoch_end(self, trainer, module):
            raise RuntimeError("on the driver")

    failing_fit(ray_trainer, Net(), RuntimeError, callbacks=Fails())
    check_next_fit(ray_trainer)


def test_a_worker_that_dies(ray_trainer, tmp_path):
    """No failure is recovered from with max_failures=0."""

    class Dies(Where):
        def training_step(self, batch, batch_idx):
            if self.global_rank == 1 and batch_idx == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().training_step(batch, batch_idx)

    module = Dies(tmp_path / "where")
    caught, _ = failing_fit(ray_trainer, module, WorkerLostError, max_failures=0)
    assert caught.rank == 1 and "rank 1" in str(caught)
    pids = module.taken()
    eventually(lambda: not any(map(alive, pids)), "the survivor, stuck in a collective, ends too")
    check_next_fit(ray_trainer)


def test_user_code_that_exits(all_are_heard, ray_trainer, tmp_path):
    """By sys.exit, as in one process: it is the run's end, with its code, and no worker is lost by it."""

    class Leaves(Where):
        def on_train_start(self):
            raise SystemExit(3)

    module, well = Leaves(tmp_path / "where"), Where(tmp_path / "where")
    caught, where = failing_fit(ray_trainer, module, SystemExit)
    assert caught.code == 3 and where.rank == 0
    pids = module.taken()
    ray_trainer(max_epochs=1).fit(well, loader(16, 4))
    assert well.taken() == pids


# ---------------------------------------------------------------- what cannot be sent


class Reader:
    def __init__(self, path: str) -> None:
        self.handle = open(path, "a")  # noqa: SIM115  # cloudpickle sends files that are read as their text


def test_an_attribute_that_cannot_be_pickled_is_named(ray_trainer, tmp_path):
    path = tmp_path / "file"
    path.write_text("text")

    class Head(Module):
        def __init__(self):
            super().__init__()
            self.readers = {"first": [Reader(str(path))]}

    class Holder(Net):
        def __init__(self, reader):
            super().__init__()
            self.reader = reader

    reader = Reader(str(path))
    caught, _ = failing_fit(ray_trainer, Holder(reader), SerializationError)
    assert "Holder.reader.handle (a TextIOWrapper)" in str(caught)
    assert "setup(stage)" in str(caught) and "__getstate__" in str(caught)

    class Leaves(Holder):
        def __getstate__(self):
            return {name: value for name, value in super().__getstate__().items() if name != "reader"}

    caught, _ = failing_fit(ray_trainer, Leaves(reader), SerializationError)
    assert "Leaves.hparams.reader.handle" in str(caught) and "save_hyperparameters(ignore=" in str(caught)

    module = Net()
    module.head = Head()
    caught, _ = failing_fit(ray_trainer, module, SerializationError)
    assert "Net.head.readers.first.0.handle" in str(caught)

    data = DataModule()
    data.lock = threading.Lock()
    data.train_dataloader = None
    with pytest.raises(SerializationError, match=r"DataModule\.lock \(a lock\)"):
        ray_trainer(max_epochs=1).fit(Net(), loader(16, 4), datamodule=data)

    held = DataLoader(table(16), batch_size=4, collate_fn=reader)
    caught, _ = failing_fit(ray_trainer, Net(), SerializationError, held)
    assert "collate_fn.handle" in str(caught)
    reader.handle.close()
    module.head.readers["first"][0].handle.close()
    check_next_fit(ray_trainer)


def test_an_answer_that_cannot_be_pickled(all_are_heard, ray_trainer, tmp_path):
    """It is an error of the step's, and the workers stay."""

    class Gives(Where):
        def predict_step(self, batch, batch_idx):
            return (row for row in batch)

    module = Gives(tmp_path / "notes")
    ray_trainer(max_epochs=1).fit(module, loader(16, 4))
    pids = module.taken()
    with pytest.raises(SerializationError, match=r"what rank \d was to send .*cannot pickle 'generator'.*predict_step"):
        ray_trainer().predict(module, loader(16, 4))
    assert module.taken() == pids
    ray_trainer(max_epochs=1).fit(module, loader(16, 4))
    assert module.taken() == pids


def test_a_module_that_cannot_be_unpickled(ray_trainer):
    """The worker's traceback says what went wrong there."""

    class Explodes:
        def __reduce__(self):
            return eval, ("{}['only on workers']",)

    class Holder(Net):
        def __init__(self):
            super().__init__()
            self.bomb = Explodes()

    caught, where = failing_fit(ray_trainer, Holder(), KeyError)
    assert "only on workers" in str(caught) and where.rank in (0, 1)
    check_next_fit(ray_trainer)
