from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from raytrainer.callbacks import _progress_display
from raytrainer.callbacks._numbers import format_metrics, format_value
from raytrainer.callbacks._progress_display import PlainDisplay, RichDisplay, is_live
from raytrainer.callbacks.progress import ProgressBar, add_up, epoch_label
from raytrainer.errors import ConfigurationError
from raytrainer.module import Module
from raytrainer.plan.settings import Settings


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def chunk(batch: int) -> SimpleNamespace:
    return SimpleNamespace(batch=batch, batches=batch)


def epoch(trainer, bar: ProgressBar) -> None:
    bar.on_train_epoch_start(trainer, None)
    for batch in (5, 10):
        bar.on_train_chunk_end(trainer, None, chunk(batch))
    bar.on_validation_start(trainer, None)
    bar.on_evaluation_chunk_end(trainer, None, chunk(2))
    bar.on_validation_end(trainer, None)
    trainer.progress_bar_metrics = {"loss": 0.1234, "val_acc": 0.98}
    bar.on_train_epoch_end(trainer, None)
    trainer.current_epoch += 1


def fit(trainer, bar: ProgressBar) -> None:
    bar.setup(trainer, None, "fit")
    trainer.sanity_checking = True
    bar.on_validation_start(trainer, None)
    bar.on_validation_end(trainer, None)
    trainer.sanity_checking = False
    epoch(trainer, bar)
    epoch(trainer, bar)
    bar.on_train_end(trainer, None)
    bar.teardown(trainer, None, "fit")


def test_metrics_asked_for_are_shown(local_trainer, capsys):
    """Also those that were not logged for the bar, in the line of the epoch."""

    class Net(Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            for name in ("gpu_memory/min", "gpu_memory/max", "other"):
                self.log(name, 7.0)
            self.log("shown", 8.0, prog_bar=True)
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Bar(ProgressBar):
        def get_metrics(self, trainer, module):
            return {**super().get_metrics(trainer, module), "kind": type(module).__name__, "tensor": torch.tensor(0.5)}

    bar = Bar(metrics="gpu_memory/*")
    local_trainer(max_epochs=1, callbacks=bar, enable_progress_bar=True, log_every_n_steps=1).fit(
        Net(), [torch.ones(2, 2)] * 3
    )
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 0/0")]
    assert "kind Net" in line and "tensor 0.500" in line
    assert "shown 8.000" in line and "gpu_memory/min 7.000" in line and "gpu_memory/max 7.000" in line
    assert "other" not in line
    for wrong in ([3], 3):
        with pytest.raises(ConfigurationError, match="metrics"):
            ProgressBar(metrics=wrong)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (0, "0"), (0.0, "0.000"), (12, "12"), (3e-5, "3.00e-05"), (2e7, "2.00e+07"), (-1.5, "-1.500")],
)
def test_values_are_short(value, text):
    assert format_value(value) == text


def test_values_that_are_no_numbers():
    assert [format_value(float("nan")), format_value(float("-inf"))] == ["nan", "-inf"]


def test_words():
    assert format_metrics({"loss": 0.1, "n": 3}) == "loss 0.100  n 3"
    assert [epoch_label(2, 9), epoch_label(2, None), epoch_label(2, -1)] == ["Epoch 2/8", "Epoch 2", "Epoch 2"]
    assert [add_up([2, 3]), add_up([2, None]), add_up([])] == [5, None, 0]


def test_plain_lines_without_a_terminal(trainer, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # which batch systems set, and which must not bring live bars
    bar = ProgressBar()
    fit(trainer, bar)
    fit(trainer, bar)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 0/8", "epoch 1/8", "epoch 2/8", "epoch 3/8"]
    assert lines[0] == "epoch 0/8  10 batches  0.0 s  loss 0.123  val_acc 0.980"


@pytest.mark.parametrize(("stage", "label"), [("validate", "validation"), ("test", "test"), ("predict", "predict")])
def test_a_line_for_an_evaluation_of_its_own(trainer, capsys, stage, label):
    trainer.state.fn, trainer.progress_bar_metrics = stage, {"acc": 0.5}
    hook = "validation" if stage == "validate" else stage
    bar = ProgressBar()
    bar.setup(trainer, None, stage)
    getattr(bar, f"on_{hook}_start")(trainer, None)
    bar.on_evaluation_chunk_end(trainer, None, chunk(4))
    getattr(bar, f"on_{hook}_end")(trainer, None)
    bar.teardown(trainer, None, stage)
    assert capsys.readouterr().out == f"{label}  4 batches  0.0 s  acc 0.500\n"


def test_heartbeat():
    lines: list[str] = []
    now = [0.0]
    display = PlainDisplay(lines.append, lambda: now[0])
    display.start("train", "Epoch 1/9", 500)
    for second in range(1, 71):
        now[0] = float(second)
        display.update("train", 100 + second * 5, {"loss": 0.5})
    assert lines == [
        "epoch 1/9  250/500 batches  30.0 s  5.0 it/s  loss 0.500",
        "epoch 1/9  400/500 batches  60.0 s  5.0 it/s  loss 0.500",
    ]


def test_nothing_at_rate_0(trainer, capsys):
    fit(trainer, ProgressBar(refresh_rate=0))
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigurationError, match="-1"):
        ProgressBar(refresh_rate=-1)


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = Terminal()
    monkeypatch.setattr(
        _progress_display, "Console", lambda: Console(file=file, width=120, force_terminal=True, color_system=None)
    )
    return file


def last_screen(file: Terminal) -> list[str]:
    """What is left after the last redraw."""
    screen = file.getvalue().rpartition("\x1b[2K")[2].replace("\x1b[?25h", "")
    return [line.rstrip() for line in screen.splitlines() if line.strip()]


@pytest.mark.parametrize(("leave", "epochs"), [(False, ["Epoch 1/8"]), (True, ["Epoch 0/8", "Epoch 1/8"])])
def test_live_bars(trainer, terminal, leave, epochs):
    fit(trainer, ProgressBar(leave=leave))
    text = terminal.getvalue()
    assert "Sanity check" in text and "Validation" in text
    lines = last_screen(terminal)
    assert [line.split("  ")[0] for line in lines] == epochs
    assert "10/10" in lines[-1] and "it/s" in lines[-1] and "loss=0.123 val_acc=0.980" in lines[-1]
    assert text.rstrip("\n").count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize("width", [40, 60, 80, 120, 160])
def test_bars_fit_the_terminal(monkeypatch, width):
    """A metric is never broken, and no line is longer than the terminal."""
    monkeypatch.setenv("TERM", "xterm")
    live, paper = (Console(file=Terminal(), width=width, force_terminal=True, color_system=None) for _ in range(2))
    display = RichDisplay(live, 0.5, leave=False)
    metrics = {"loss": 0.12345, "train_acc": 0.98, "val_loss": 0.25, "val_acc": 0.9, "lr-AdamW": 3e-4}
    display.start("train", "Epoch 12/100", 1000)
    display.update("train", 312, metrics)
    display.start("evaluation", "Validation", 50)
    display.update("evaluation", 12, {})
    paper.print(*display._progress.get_renderables(), sep="\n")
    display.close()
    lines = paper.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for name, value in metrics.items():
        assert any(f"{name}={format_value(value)}" in line for line in lines), name
    (train,) = (line for line in lines if "Epoch 12/100" in line)
    (evaluation,) = (line for line in lines if "Validation" in line)
    assert train.index("312/1000") + len("312/1000") == evaluation.index("12/50") + len("12/50")
    assert ("it/s" in train) == (width >= 60) and ("loss=" in train) == (width == 160)


def test_live_bar_of_unknown_length(trainer, terminal):
    trainer.num_training_batches = None
    bar = ProgressBar()
    bar.setup(trainer, None, "fit")
    bar.on_train_epoch_start(trainer, None)
    bar.on_train_chunk_end(trainer, None, chunk(7))
    assert isinstance(bar._display, RichDisplay)
    assert bar._display._progress.tasks[0].total is None
    bar.on_train_epoch_end(trainer, None)
    bar.on_train_end(trainer, None)
    assert "7/7" in last_screen(terminal)[-1]


@pytest.mark.parametrize("end", ["on_exception", "teardown"])
def test_the_terminal_is_given_back(trainer, terminal, end):
    stdout = sys.stdout
    bar = ProgressBar()
    bar.setup(trainer, None, "fit")
    bar.on_train_epoch_start(trainer, None)
    progress = bar._display._progress
    assert progress.live.is_started
    bar.on_exception(trainer, None, KeyboardInterrupt()) if end == "on_exception" else bar.teardown(
        trainer, None, "fit"
    )
    assert not progress.live.is_started and sys.stdout is stdout
    bar.teardown(trainer, None, "fit")
    bar.on_train_chunk_end(trainer, None, chunk(1))  # nothing to draw on any more: no error
    fit(trainer, bar)


def test_live_only_where_it_can_be_redrawn(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert is_live(Console(file=Terminal()))
    assert not is_live(Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setenv("TERM", "dumb")
    assert not is_live(Console(file=Terminal()))


@pytest.mark.parametrize(
    ("batches", "max_steps", "done", "accumulate", "resumed", "total"),
    [(10, -1, 0, 1, False, 10), (10, 4, 0, 1, False, 4), (10, 4, 1, 2, False, 6), (10, 40, 8, 1, False, 10),
     (None, 4, 0, 1, False, 4), (None, -1, 0, 1, False, None), (10, 4, 2, 1, True, 10)],
)  # fmt: skip
def test_max_steps_shortens_the_bar(trainer, batches, max_steps, done, accumulate, resumed, total):
    trainer.num_training_batches, trainer.max_steps, trainer.global_step = batches, max_steps, done
    trainer.settings = Settings(accumulate_grad_batches=accumulate)
    trainer.ckpt_path = "some.ckpt" if resumed else None
    assert ProgressBar._batches_to_come(trainer) == total
