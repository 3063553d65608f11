"""What a notebook's cell shows: nothing by stderr, tables, a plot once; short reprs everywhere."""

from __future__ import annotations

import logging
import re
import types

import pytest
import torch
from tiny import Tiny, data

import raytrainer as rt
from raytrainer import cells


@pytest.fixture
def cell(monkeypatch):
    """A kernel that runs cell 1, and what it is shown."""
    pytest.importorskip("IPython")
    shown: list[dict[str, str]] = []
    shell = types.SimpleNamespace(kernel=object(), execution_count=1, shown=shown)
    monkeypatch.setattr(cells, "_shell", lambda: shell)
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    return shell


def test_the_log_is_no_error_in_a_cell(cell, capsys, monkeypatch):
    logging.getLogger("raytrainer").warning("told")
    assert capsys.readouterr() == ("told\n", "")
    monkeypatch.setattr(cells, "_shell", lambda: None)
    logging.getLogger("raytrainer").warning("told")
    assert capsys.readouterr() == ("", "told\n")


def test_a_terminal_of_ipythons_is_no_notebook(monkeypatch):
    ipython = pytest.importorskip("IPython")
    monkeypatch.setattr(ipython, "get_ipython", lambda: types.SimpleNamespace())
    assert not cells.in_notebook() and cells.cell_number() is None


def test_the_summary_is_a_table(cell, local_trainer, capsys):
    local_trainer(max_epochs=1, enable_model_summary=True).fit(Tiny(), data())
    (summary,) = cell.shown
    assert summary["text/html"].startswith("<table>") and "trainable" in summary["text/html"]
    assert "---" in summary["text/plain"] and "Params" not in capsys.readouterr().out


def test_a_plot_is_shown_once_by_its_cell(cell, tmp_path):
    pytest.importorskip("matplotlib")
    trainer = rt.Trainer(
        max_epochs=1, log_every_n_steps=1, logger=rt.CSVLogger(tmp_path), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip

    class Logs(Tiny):
        def training_step(self, batch, batch_idx):
            self.log("loss", 1.0)
            return super().training_step(batch, batch_idx)

    trainer.fit(Logs(), data())
    figure = trainer.plot()
    figure._ipython_display_()  # as the cell's last expression
    assert len(cell.shown) == 1 and cell.shown[0]["image/png"].startswith("iVBOR")
    cell.execution_count = 2
    figure._ipython_display_()
    assert len(cell.shown) == 2


def test_html_is_escaped():
    assert "&lt;b&gt;" in cells.html_table([("a",), ("<b>",)], ["<b>"]) and "<b>" not in cells.html_table([("<b>",)])


def test_a_trainer_says_what_it_is_and_did(local_trainer):
    trainer = local_trainer(max_epochs=2)
    assert repr(trainer) == "<Trainer: this process, max_epochs=2; new>"

    class Logs(Tiny):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 0.5)

    trainer.fit(Logs(), data(), data())
    assert repr(trainer) == "<Trainer: this process, max_epochs=2; fit finished, epoch 2, step 20>"
    assert re.search(r"val_loss</td>.*>0\.500</td>", trainer._repr_html_())
    assert "ddp, 3 workers" in repr(rt.Trainer(num_processes=3, max_steps=1))


def test_a_large_module_is_shown_by_its_parts():
    class Large(rt.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(40)))
            self.head = torch.nn.LazyLinear(1)

    assert repr(Large()) == ("Large(\n  (encoder): Sequential, 240 parameters\n  (head): LazyLinear, 0 parameters\n)")
    assert "Large: 240 parameters" in Large()._repr_html_() and "<td" in Large()._repr_html_()
    assert repr(Tiny()) == torch.nn.Module.__repr__(Tiny())
