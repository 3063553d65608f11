"""Every wait for workers ends: by the verb's limit, or by Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from ray_models import Net, eventually, loader

from raytrainer import WorkerLostError
from raytrainer.worker import verbs

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.late(1)]


class Stuck(Net):
    """Its set-up in the worker does not end by itself."""

    def __init__(self, reached: Path) -> None:
        super().__init__()
        self.reached = str(reached)

    def setup(self, stage: str) -> None:
        Path(self.reached).touch()
        while True:
            time.sleep(0.05)  # what a download that hangs is made of


@pytest.mark.sample(0)
def test_a_set_up_has_a_limit_and_ends_with_control_c(ray_trainer, monkeypatch, tmp_path):
    trainer = ray_trainer(num_processes=1, max_epochs=1, max_failures=0)
    trainer.fit(Net(), loader(8, 4))  # from here on the worker is warm: all but the set-up takes a moment
    with monkeypatch.context() as patch:
        patch.setattr(verbs, "LONG", 5.0)
        with pytest.raises(WorkerLostError, match=r"no answer from rank\(s\) \[0\] for 5 s \(the limit for setup\)"):
            trainer.fit(Stuck(tmp_path / "first"), loader(8, 4))

    def press() -> None:
        eventually((tmp_path / "second").exists, "the set-up has begun")
        os.kill(os.getpid(), signal.SIGINT)

    presses = threading.Thread(target=press)
    presses.start()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Stuck(tmp_path / "second"), loader(8, 4))
    presses.join()
    assert trainer.interrupted
    trainer.fit(Net(), loader(8, 4))
    assert trainer.state.finished
