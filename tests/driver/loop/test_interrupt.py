"""Ctrl-C in process: before training it ends the run at once, later at the next boundary."""

from __future__ import annotations

import signal

import pytest
from tiny import Tiny, data


class PressedIn(Tiny):
    """Ctrl-C is pressed in one of its hooks."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.pressed_in, self.after = hook, []

    def press(self, hook: str) -> None:
        if hook == self.pressed_in:
            self.pressed_in = ""
            signal.raise_signal(signal.SIGINT)
            self.after.append(hook)

    def setup(self, stage):
        self.press("setup")

    def on_fit_start(self):
        self.press("on_fit_start")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.press("on_train_batch_end")


def test_a_set_up_ends_at_once(local_trainer):
    module, trainer = PressedIn("setup"), local_trainer(max_epochs=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(module, data())
    assert module.after == []  # nothing more of the hook was run
    assert trainer.interrupted and trainer.state.status == "interrupted" and trainer.global_step == 0
    trainer.fit(module, data())
    assert trainer.state.finished and trainer.global_step == 20


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_batch_end"])
def test_afterwards_the_next_boundary_ends_the_run(hook, local_trainer):
    module, trainer = PressedIn(hook), local_trainer(max_epochs=9)
    trainer.fit(module, data())
    assert module.after == [hook]
    assert trainer.interrupted and trainer.state.status == "interrupted" and trainer.global_step < 90
