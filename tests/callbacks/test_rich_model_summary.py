from __future__ import annotations

from tiny import Tiny, data

from raytrainer import RichModelSummary


def test_a_table_without_a_terminal(local_trainer, capsys):
    """It takes the place of the plain one, and says the same."""
    local_trainer(max_epochs=1, enable_model_summary=True, callbacks=RichModelSummary(-1)).fit(Tiny(), data(2))
    out = capsys.readouterr().out
    assert "┃" in out and "layer" in out and "Linear" in out
    assert out.count("10 trainable, 0 non-trainable") == 1


def test_totals_only(capsys):
    RichModelSummary(0).on_fit_start(None, Tiny())
    assert capsys.readouterr().out == "10 trainable, 0 non-trainable parameters\n10 parameters in total, 0.000 MB\n"
