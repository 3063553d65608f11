"""The table that an evaluation prints."""

import pytest

from raytrainer.driver.reporting import results


@pytest.fixture
def printed(capsys, monkeypatch):
    def of(found, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        results.print_results("validate", found)
        out = capsys.readouterr().out
        return [[cell.strip() for cell in line.strip("│┃").split("│" if "│" in line else "┃")]
                for line in out.splitlines() if "│" in line or "┃" in line], out  # fmt: skip

    return of


def test_one_loader(printed):
    rows, _ = printed([{"val_loss": 0.25, "val_acc": 1}])
    assert rows == [["validate metric", "value"], ["val_loss", "0.25"], ["val_acc", "1"]]


def test_a_column_for_each_loader(printed):
    rows, _ = printed([{"loss": 0.25}, {"other": 3.0}])
    assert rows == [["validate metric", "loader 0", "loader 1"], ["loss", "0.25", ""], ["other", "", "3"]]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_numbers_stay_whole_where_loaders_are_many(printed, columns):
    rows, out = printed([{"loss": 1234.56, "a_rather_long_name": 0.123456}] * 12, columns)
    assert rows[0] == ["loader", "validate metric", "value"] and rows[-1] == ["11", "a_rather_long_name", "0.123456"]
    assert len(rows) == 25 and max(map(len, out.splitlines())) <= columns


def test_a_table_of_html_in_notebooks(monkeypatch):
    shown = []
    monkeypatch.setattr(results, "in_notebook", lambda: True)
    monkeypatch.setattr(results, "show_html", lambda *texts: shown.append(texts))
    results.print_results("test", [{"acc": 0.5}])
    ((html, plain),) = shown
    assert "<table>" in html and ">0.5<" in html and plain == "test metric  value\nacc  0.5"


def test_nothing_to_print(printed):
    assert printed([{}, {}]) == ([], "")
