"""Faults that strike in every hook, callback, logger call and verb of a run, and what has to be true afterwards.

`tests/test_ends.py` and `tests/ray/test_ray_ends.py` try a part of this. All of it, over two workers too:

    python tests/injection.py [--workers 2] [--part 1/3] [WORD ...]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import Tiny, data

import raytrainer
from raytrainer.signals import exit_in_order
from raytrainer.worker.verbs import Verb
from raytrainer.worker.worker import Worker

#: What strikes: an error, user code's exit, Ctrl-C once, SIGTERM.
FAULTS = ("error", "exit", "control-c", "sigterm")

#: What a run must not leave: the name of the thread that writes checkpoints.
WRITER = "checkpoint-writer"


class Fault(Exception):
    """Struck on purpose."""


class Plan:
    """Where to strike, and how; once in all processes of a run.

    Args:
        place: E.g. "Module.on_fit_start"; "": nowhere, but all places are noted.
        fault: One of `FAULTS`.
        folder: For notes that all processes see.
    """

    def __init__(self, place: str, fault: str, folder: Path) -> None:
        self.place, self.fault, self.folder, self.driver = place, fault, str(folder), os.getpid()

    def strike(self, place: str) -> None:
        if not self.place:
            Path(self.folder, f"seen {place}").touch()
        if place != self.place:
            return
        try:
            os.close(os.open(f"{self.folder}/struck", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        if self.fault == "error":
            raise Fault(place)
        if self.fault == "exit":
            sys.exit(3)
        number = signal.SIGINT if self.fault == "control-c" else signal.SIGTERM
        if os.getpid() == self.driver:
            signal.raise_signal(number)
        else:
            os.kill(self.driver, number)

    @property
    def struck(self) -> bool:
        return Path(self.folder, "struck").exists()

    def seen(self) -> list[str]:
        return sorted(path.name.removeprefix("seen ") for path in Path(self.folder).glob("seen *"))


def struck(base: type, plan: Plan, own: Sequence[type], kind: str) -> Any:
    """A subclass of `base` that strikes in each hook that the classes `own` declare, then does what `base` does."""

    def make(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(base, name))  # steps are called by their signature
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            plan.strike(f"{kind}.{name}")
            return getattr(base, name)(self, *args, **kwargs)

        return hook

    skipped = ("__", "_", "test_", "predict_", "training_step_end", "validation_step_end", "train_dataset")
    names = {
        name
        for cls in own
        for name, value in vars(cls).items()
        if callable(value) and not name.startswith(skipped) and not name.endswith("_dataset")
    }
    return type(base.__name__, (base,), {name: make(name) for name in names})


class Memory(raytrainer.Logger):
    """Keeps nothing."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any) -> None:
        pass

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        pass


class Net(Tiny):
    """Calls what there is to call."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        if self.logger is not None:
            self.logger.log_text("said", "something")
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Failing(Net):
    """Fails by itself, so that what is told of failures is called."""

    def on_train_end(self) -> None:
        raise ArithmeticError("by itself")


class Data(raytrainer.DataModule):
    def train_dataloader(self) -> Any:
        return data(8, 2)

    def val_dataloader(self) -> Any:
        return data(4, 2)


class Bench:
    """One trainer with everything that can be struck.

    Args:
        plan: Where and how.
        make_trainer: `raytrainer.Trainer` with options of one's own.
    """

    def __init__(self, plan: Plan, make_trainer: Callable[..., raytrainer.Trainer]) -> None:
        from raytrainer.data.data_hooks import DataHooks
        from raytrainer.module_hooks import ModuleHooks
        from raytrainer.stateful_callback import StatefulCallback

        self.plan = plan
        net = Failing if plan.place.endswith("on_exception") else Net
        self.module = struck(net, plan, (ModuleHooks, DataHooks, Net), "Module")()
        self.data = struck(Data, plan, (DataHooks,), "DataModule")()
        callback = struck(raytrainer.Callback, plan, (raytrainer.Callback, StatefulCallback), "Callback")
        worker = struck(
            raytrainer.WorkerCallback, plan, (raytrainer.WorkerCallback, StatefulCallback), "WorkerCallback"
        )
        logger = struck(Memory, plan, (raytrainer.Logger, Memory), "Logger")
        self.trainer = make_trainer(
            max_epochs=1,
            callbacks=[callback(), worker(), raytrainer.ModelCheckpoint(f"{plan.folder}/checkpoints")],
            logger=logger(),
            num_sanity_val_steps=1,
            log_every_n_steps=1,
            enable_checkpointing=True,
        )

    def fit(self) -> BaseException | None:
        """What `fit` raises."""
        try:
            self.trainer.fit(self.module, datamodule=self.data)
        except BaseException as error:
            return error
        return None

    def check(self) -> str:
        """Strike, and say what came of it.

        Raises:
            AssertionError: Something is left over, is not told, or does not go on.
        """
        plan, trainer = self.plan, self.trainer
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        error = self.fit()
        if not plan.struck:
            return "not called"
        self.check_told(error)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] in (
            handlers,
            [handlers[0], exit_in_order],  # Ray is in use now
        )
        assert WRITER not in {thread.name for thread in threading.enumerate()}, "the writer is still there"
        assert trainer._run is None or not trainer._run._held, "workers have not been given back"
        saver = trainer.checkpoint_callback
        if saver.best_model_path:
            Tiny.load_from_checkpoint(saver.best_model_path)
        again = self.fit()
        if type(self.module).__mro__[1] is Failing:
            assert isinstance(again, ArithmeticError), again
        else:
            assert again is None and trainer.state.finished, again
            assert trainer.global_step in (2, 4) and not trainer.interrupted
            Tiny.load_from_checkpoint(saver.best_model_path)
        return "returned" if error is None else type(error).__name__

    def check_told(self, error: BaseException | None) -> None:
        """The first error is the one that is told."""
        plan, state = self.plan, self.trainer.state
        if plan.fault == "sigterm":
            assert isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM, repr(error)
        elif type(self.module).__mro__[1] is Failing:
            assert isinstance(error, ArithmeticError), repr(error)
        elif plan.fault == "control-c":
            assert error is None or isinstance(error, KeyboardInterrupt), repr(error)
            late = plan.place in ("Callback.teardown", "Logger.finalize")
            assert (self.trainer.interrupted and state.status == "interrupted") or (late and error is not None)
        elif plan.fault == "exit":
            assert isinstance(error, SystemExit) and error.code == 3, repr(error)
            assert state.status == "failed"
        elif plan.place.startswith("Logger."):
            assert error is None, repr(error)  # a logger that fails never ends a run
        else:
            assert isinstance(error, Fault) and str(error) == plan.place, repr(error)
            assert state.status == "failed"


@contextlib.contextmanager
def struck_verbs(plan: Plan) -> Iterator[None]:
    """Strike before and after each verb too: in this process, as if raytrainer's own code failed."""
    saved = {name: method for name, method in vars(Worker).items() if isinstance(getattr(method, "verb", None), Verb)}

    def make(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def obey(self: Any, *args: Any, **kwargs: Any) -> Any:
            plan.strike(f"before.{name}")
            answer = method(self, *args, **kwargs)
            plan.strike(f"after.{name}")
            return answer

        obey.__dict__["verb"] = method.__dict__["verb"]
        return obey

    for name, method in saved.items():
        if name not in ("abandon", "rest"):  # what undoes is not struck itself
            setattr(Worker, name, make(name, method))
    try:
        yield
    finally:
        for name, method in saved.items():
            setattr(Worker, name, method)


def places(make_trainer: Callable[..., raytrainer.Trainer], folder: Path) -> list[str]:
    """All places that a run comes by, and those of a failing one."""
    plan = Plan("", "", folder)
    with struck_verbs(plan):
        bench = Bench(plan, make_trainer)
        error = bench.fit()
    if error is not None:
        raise error
    return [*plan.seen(), "Callback.on_exception", "WorkerCallback.on_exception"]


def trainer_options(folder: Path, **options: Any) -> dict[str, Any]:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    return {**quiet, **options}


def main() -> None:
    """Try everything, and print what came of it."""
    logging.getLogger("raytrainer").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=0, help="over Ray; 0: in this process")
    parser.add_argument("--part", default="1/1", help="which part of how many")
    parser.add_argument("words", nargs="*", help="only what has one of these in its name")
    given = parser.parse_args()
    workers, words, (part, parts) = given.workers, given.words, map(int, given.part.split("/"))
    where = {"strategy": "ddp", "num_processes": workers} if workers else {"strategy": "local"}

    def make(**options: Any) -> raytrainer.Trainer:
        return raytrainer.Trainer(**trainer_options(Path(tempfile.gettempdir()), **where, **options))

    failed = count = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in ("all", *FAULTS):
            Path(folder, name).mkdir()
        local = {"strategy": "local"}
        found = places(
            lambda **o: raytrainer.Trainer(**trainer_options(Path(folder), **local, **o)), Path(folder, "all")
        )
        for place in found:
            if workers and place.startswith(("before.", "after.")):
                continue
            for fault in FAULTS:
                if (place, fault) == ("Module.configure_callbacks", "sigterm"):
                    continue  # nothing has begun: SIGTERM does what it does outside of runs
                if words and not any(word in f"{place} {fault}" for word in words):
                    continue
                count += 1
                if count % parts != part % parts:
                    continue
                began = time.monotonic()
                with tempfile.TemporaryDirectory() as own:
                    plan = Plan(place, fault, Path(own))
                    try:
                        with struck_verbs(plan):
                            said = Bench(plan, make).check()
                    except BaseException as error:
                        failed += 1
                        said = f"FAILED {type(error).__name__}: {error}"
                print(f"{place:45} {fault:10} {time.monotonic() - began:5.1f} s  {said}", flush=True)
    print(f"{failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    main()
