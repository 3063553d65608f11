from __future__ import annotations

from typing import Any

import pytest

from raytrainer.callbacks._notebook import NotebookDisplay


class Cell:
    """Takes what is shown, at times that the test sets."""

    def __init__(self) -> None:
        self.shown: list[dict[str, Any]] = []
        self.now = 100.0

    def display(self, refresh_rate: float = 0.5, leave: bool = False) -> NotebookDisplay:
        return NotebookDisplay(refresh_rate, leave, self.shown.append, lambda: self.now)

    @property
    def text(self) -> list[str]:
        return self.shown[-1]["text/plain"].splitlines()

    @property
    def html(self) -> str:
        return self.shown[-1]["text/html"]


@pytest.fixture
def cell() -> Cell:
    return Cell()


def test_redraws_at_most_so_often(cell):
    display = cell.display(refresh_rate=0.5)
    display.start("train", "Epoch 1/2", 80)
    for done in range(1, 81):
        cell.now += 0.125
        display.update("train", done, {"loss": 1 / done})
    assert len(cell.shown) == 1 + 20
    display.end("train", 80, {"loss": 0.01}, say=True)
    display.close()
    assert cell.text == ["Epoch 1/2  80/80  0:10  8.0 it/s  loss 0.010"]
    count = len(cell.shown)
    display.close()
    assert len(cell.shown) == count


def test_an_epoch_and_its_validation(cell):
    display = cell.display(refresh_rate=0.0)
    display.start("train", "Epoch 1/2", 10)
    cell.now += 1.0
    display.update("train", 4, {})
    cell.now += 2.0
    display.update("train", 8, {"loss": 0.5})
    assert cell.text == ["Epoch 1/2  8/10  0:03 < 0:01  2.0 it/s  loss 0.500"]
    assert 'value="8" max="10"' in cell.html
    display.start("evaluation", "Validation", 2)
    assert [line.split("  ")[0] for line in cell.text] == ["Epoch 1/2", "Validation"]
    display.update("evaluation", 2, {})
    display.end("evaluation", 2, {}, say=False)
    assert [line.split("  ")[0] for line in cell.text] == ["Epoch 1/2"]


@pytest.mark.parametrize(
    ("leave", "epochs"),
    [(None, ["Epoch 1/2", "Epoch 2/2"]), (False, ["Epoch 2/2"]), (True, ["Epoch 1/2", "Epoch 2/2"])],
)
def test_what_stays(cell, leave, epochs):
    display = cell.display(leave=leave)
    for label in ("Epoch 1/2", "Epoch 2/2"):
        display.start("train", label, 3)
        display.end("train", 3, {}, say=True)
    display.close()
    assert [line.split("  ")[0] for line in cell.text] == epochs
    assert cell.html.count("<progress") == len(epochs)


@pytest.mark.parametrize(("leave", "first", "lines"), [(None, "10 earlier epochs", 31), (True, "Epoch 0", 40)])
def test_a_long_run_keeps_its_last_epochs(cell, leave, first, lines):
    display = cell.display(leave=leave)
    for epoch in range(40):
        display.start("train", f"Epoch {epoch}", 3)
        display.end("train", 3, {}, say=True)
    display.close()
    assert cell.text[0].startswith(first) and cell.text[-1].startswith("Epoch 39")
    assert len(cell.text) == cell.html.count("<tr") == lines


def test_a_length_that_becomes_known_at_the_end(cell):
    display = cell.display(refresh_rate=0.0)
    display.start("train", "Epoch 1", None)
    display.update("train", 3, {})
    assert "<progress style" in cell.html and cell.text[0].startswith("Epoch 1  3  0:00")
    display.end("train", 5, {}, say=True)
    assert 'value="5" max="5"' in cell.html


def test_an_interrupted_bar_stands_still(cell):
    display = cell.display()
    display.start("train", "Epoch 1", 10)
    cell.now += 0.1
    display.update("train", 3, {})
    display.close()
    assert cell.text == ["Epoch 1  3/10  0:00  30.0 it/s"]


def test_names_cannot_break_the_page(cell):
    display = cell.display(refresh_rate=0.0)
    display.start("train", "Epoch 1", 1)
    display.update("train", 1, {"<b>loss</b>": 1.0})
    assert "<b>" not in cell.html and "&lt;b&gt;loss&lt;/b&gt;=1.000" in cell.html
