"""However a run ends: the first error is told, what was announced is there, nothing is left, and the next run works.

`python tests/injection.py --workers 2` tries all of this over Ray.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from injection import FAULTS, WRITER, Bench, Plan, places, struck_verbs
from tiny import Tiny, data, weights

import raytrainer
from raytrainer.checkpointing import checkpoint_format
from raytrainer.driver.saving import checkpoint_writer


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("calm")

    def make(**options: Any) -> raytrainer.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
        return raytrainer.Trainer(strategy="local", **{**quiet, **options})

    return places(make, folder)


@pytest.mark.sample(2)
@pytest.mark.parametrize("fault", FAULTS)
def test_wherever_it_strikes(fault: str, everywhere: list[str], local_trainer: Any, tmp_path: Path) -> None:
    assert len(everywhere) > 100
    failed, before = {}, set(threading.enumerate())
    for index, place in enumerate(everywhere):
        if (place, fault) == ("Module.configure_callbacks", "sigterm"):
            continue  # nothing has begun: SIGTERM does what it does outside of runs
        folder = tmp_path / str(index)
        folder.mkdir()
        plan = Plan(place, fault, folder)
        try:
            with struck_verbs(plan):
                assert Bench(plan, local_trainer).check() != "not called"
        except BaseException as error:
            failed[place] = repr(error)
    assert not failed, "\n".join(f"{place}: {error}" for place, error in failed.items())
    assert set(threading.enumerate()) == before


class Fails(raytrainer.Callback):
    """Raises in these hooks."""

    def __init__(self, *hooks: str) -> None:
        for hook in hooks:
            setattr(self, hook, lambda *args, hook=hook: self.fail(hook))

    def fail(self, hook: str) -> None:
        raise RuntimeError(hook)


class Ends(raytrainer.Callback):
    def __init__(self) -> None:
        self.called: list[str] = []

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.called.append(f"on_exception {exception}")

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        self.called.append("teardown")


@pytest.mark.parametrize("hooks", [("on_train_end", "on_exception", "teardown"), ("on_exception", "teardown")])
def test_of_several_errors_the_first_is_told_and_all_callbacks_are_called(
    hooks: tuple[str, ...], local_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Breaks(Tiny):
        def on_fit_end(self) -> None:
            raise ValueError("of the module")

    ends = Ends()
    first = "of the module" if hooks[0] == "on_exception" else hooks[0]
    trainer = local_trainer(max_epochs=1, callbacks=[Fails(*hooks), ends])
    with pytest.raises((RuntimeError, ValueError), match=first), caplog.at_level(logging.WARNING, "raytrainer"):
        trainer.fit(Breaks(), data())
    assert ends.called == [f"on_exception {first}", "teardown"]
    assert "Fails.on_exception failed as well: RuntimeError: on_exception" in caplog.text
    assert "Fails.teardown failed as well: RuntimeError: teardown" in caplog.text
    assert trainer.state.status == "failed"


def test_checkpoints_are_there_before_teardown(local_trainer: Any, tmp_path: Path) -> None:
    class Looks(raytrainer.Callback):
        def teardown(self, trainer: Any, module: Any, stage: str) -> None:
            self.found = Path(trainer.checkpoint_callback.best_model_path, "meta.json").exists()

    looks = Looks()
    local_trainer(max_epochs=1, callbacks=[looks, raytrainer.ModelCheckpoint(tmp_path)]).fit(Tiny(), data())
    assert looks.found


class Slow:
    """Stands for `write_checkpoint`: it does not end before it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may, self.began = threading.Event(), threading.Event()
        self.write = checkpoint_format.write_checkpoint
        monkeypatch.setattr(checkpoint_writer, "write_checkpoint", self)

    def __call__(self, *args: Any) -> Any:
        self.began.set()
        assert self.may.wait(60)
        return self.write(*args)


def pressed(times: int, when: Any, then: Any) -> threading.Thread:
    """A thread that presses Ctrl-C; `when` waits for each moment, `then` is called in the end."""

    def press() -> None:
        for _ in range(times):
            when()
            os.kill(os.getpid(), signal.SIGINT)
        then()

    thread = threading.Thread(target=press)
    thread.start()
    return thread


@pytest.mark.parametrize("times", [1, 2])
def test_control_c_while_the_last_checkpoint_is_written(
    times: int, local_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once: it is written all the same. Twice: the wait ends, and writing goes on by itself. The next run is well."""
    slow, module = Slow(monkeypatch), Tiny()
    ended, in_flush, heard = threading.Event(), threading.Event(), threading.Event()
    flush = checkpoint_writer.CheckpointWriter._wait

    def wait(self: Any, condition: Any) -> None:
        in_flush.set()
        flush(self, condition)

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "_wait", wait)

    class Hears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "still being written" in record.getMessage():
                heard.set()

    hears = Hears()
    logging.getLogger("raytrainer").addHandler(hears)
    moments = iter([lambda: slow.began.wait(60) and ended.wait(60) and in_flush.wait(60), lambda: heard.wait(60)])

    class Marks(raytrainer.Callback):
        def on_fit_end(self, trainer: Any, module: Any) -> None:
            in_flush.clear()
            ended.set()

    trainer = local_trainer(max_epochs=1, callbacks=[Marks(), raytrainer.ModelCheckpoint(tmp_path)])
    presses = pressed(times, lambda: next(moments)(), lambda: times == 2 or (heard.wait(60) and slow.may.set()))
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(module, data())
    finally:
        slow.may.set()
        presses.join()
        logging.getLogger("raytrainer").removeHandler(hears)
    assert trainer.interrupted
    path = trainer.checkpoint_callback.best_model_path
    if times == 1:
        assert (weights(Tiny.load_from_checkpoint(path)) == weights(module)).all()
        assert WRITER not in {thread.name for thread in threading.enumerate()}
    for _ in range(2):
        again = Tiny()
        trainer.fit(again, data())
        path = trainer.checkpoint_callback.best_model_path
        assert (weights(Tiny.load_from_checkpoint(path)) == weights(again)).all()
