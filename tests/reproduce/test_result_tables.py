"""Tables: means and deviations are right, every form can be read again, and no failed run disappears."""

import csv
import io
import math

import numpy as np
import pytest

from s2ft.reproduce.figures import Figure, Series, save_figures
from s2ft.reproduce.results import Run
from s2ft.reproduce.tables import Column, Spread, Table, published_table, summary

BY = [Column("method"), Column("rate", form="g")]
VALUES = [Column("accuracy", "accuracy %", ".1f"), Column("trained", form=",d"), Column("never")]


def run(method, rate, seed, status="done", error=None, **row):
    labels = {"method": method, "rate": rate, "seed": seed}
    return Run("mine", labels, labels, status, [row] if status == "done" else [], error)


@pytest.fixture
def runs():
    return [
        run("lora", 1e-3, 0, accuracy=60.0, trained=1024),
        run("lora", 1e-3, 1, accuracy=63.5, trained=1024),
        run("lora", 1e-3, 2, "failed", "OutOfMemoryError: no room\n\nTraceback"),
        run("full", 1e-3, 0, "failed", "ValueError: bad"),
        run("s²ft", 1e-4, 0, accuracy=70.25, trained=512),
        run("s²ft", 1e-4, 1, "missing"),
    ]


def test_mean_and_deviation_are_those_of_numpy():
    values = [60.0, 63.5, 71.25, 59.0]
    found = Spread.of(values)
    assert found.number == 4
    assert found.mean == pytest.approx(np.mean(values), rel=1e-15)
    assert found.sd == pytest.approx(np.std(values, ddof=1), rel=1e-15)
    assert Spread.of([3.0]) == Spread(3.0, None, 1)
    assert math.isnan(Spread.of([1.0, math.nan]).mean) and Spread.of([1.0, math.inf]).sd is None


def test_every_run_is_in_the_table(runs):
    table = summary("t", "Mine", runs, BY, VALUES)
    assert [column.name for column in table.columns] == ["method", "rate", "accuracy", "trained"]  # not "never"
    assert table.rows == [
        ["lora", 1e-3, Spread.of([60.0, 63.5]), 1024],
        ["full", 1e-3, "failed", None],
        ["s²ft", 1e-4, Spread(70.25, None, 1), 512],
    ]
    assert list(table.notes) == [
        "mean ± standard deviation over 2 runs",
        "failed: lora rate 0.001 seed 2: OutOfMemoryError: no room",
        "failed: full rate 0.001 seed 0: ValueError: bad",
        "not run yet: s²ft rate 0.0001 seed 1",
    ]


def test_only_failed_runs_are_a_table_too():
    table = summary("t", "Mine", [run("full", None, 0, "failed", "bad")], BY, VALUES)
    assert table.rows == [["full", None, "failed"]] and "failed" in table.text()


def test_text(runs):
    lines = summary("t", "Mine", runs, BY, VALUES).text().splitlines()
    assert lines[:5] == [
        "Mine",
        "method     rate   accuracy %   trained",
        "lora      0.001   61.8 ± 2.5     1,024",
        "full      0.001       failed         –",
        "s²ft     0.0001         70.2       512",
    ]


def test_csv_has_mean_deviation_and_number(runs):
    table = summary("t", "Mine", runs, BY, VALUES)
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert float(rows[0]["accuracy"]) == 61.75
    assert float(rows[0]["accuracy_sd"]) == pytest.approx(np.std([60.0, 63.5], ddof=1), rel=1e-15)
    assert [row["accuracy_n"] for row in rows] == ["2", "", "1"]
    assert [row["accuracy"] for row in rows][1] == "failed" and rows[1]["trained"] == ""


def test_markdown_has_as_many_cells_in_each_row():
    table = Table("t", "Mine", [Column("a|b"), Column("n", form=".1f")], [["x|y", 1.0], ["z", None]], ["a note"])
    assert table.markdown().splitlines() == [
        "**Mine**",
        "",
        "| a\\|b | n |",
        "| --- | --: |",
        "| x\\|y | 1.0 |",
        "| z | – |",
        "",
        "a note  ",
    ]


def test_latex_escapes_what_has_a_meaning():
    table = Table("t", "50 % of S²FT_a & {b}", [Column("name"), Column("n", form=".1f")], [["a~b^c\\d#$", 1.5]])
    text = table.latex()
    assert r"\caption{50 \% of S$^2$FT\_a \& \{b\}. }".replace(". }", ".}") in text
    assert r"a\textasciitilde{}b\textasciicircum{}c\textbackslash{}d\#\$ & 1.5 \\" in text
    assert r"\begin{tabular}{lr}" in text and text.count(r"\hline") == 3
    assert r"1.0 $\pm$ 0.5" in Table("t", "", [Column("n", form=".1f")], [[Spread(1.0, 0.5, 2)]]).latex()


def test_a_table_is_saved_in_every_form(tmp_path, runs):
    table = summary("results", "Mine", runs, BY, VALUES)
    files = table.save(tmp_path / "tables")
    assert [file.name for file in files] == ["results.txt", "results.csv", "results.tex", "results.md"]
    assert files[0].read_text() == table.text() + "\n" and files[1].read_text() == table.csv()


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="a row has 1 cells for 2 columns"):
        Table("t", "Mine", [Column("a"), Column("b")], [["x"]])


def test_published_numbers():
    table = published_table("published", {"source": "a paper", "rows": [{"a": 1.5}, {"a": 2, "b": "x"}]})
    assert table.title == "Published: a paper" and table.rows == [[1.5, None], [2, "x"]]
    assert published_table("published", {}) is None


FIGURES = [
    Figure("lines", "Time", "tokens", "ms", [Series("LoRA", [1, 2], [3.0, 4.0], [0.1, 0.2])], log="xy"),
    Figure(
        "points",
        "Both",
        "x",
        "y",
        [Series("a", [1.0], [2.0], [0.1], [0.1], ["note"]), Series("b", [2.0], [1.0])],
        "points",
    ),
    Figure(
        "bars", "Tasks", "", "%", [Series("a", ["t1", "t2"], [1.0, 2.0]), Series("b", ["t2"], [3.0], [1.0])], "bars"
    ),
    Figure("empty", "Nothing", "", ""),
]


def test_figures_are_drawn_and_empty_ones_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    files = save_figures(FIGURES, tmp_path / "figures")
    assert sorted(file.name for file in files) == sorted(
        f"{name}.{form}" for name in ("lines", "points", "bars") for form in ("png", "svg")
    )
    assert all(file.stat().st_size > 1000 for file in files)


def test_without_matplotlib_the_reason_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("s2ft.packages.is_installed", lambda package: package != "matplotlib")
    assert save_figures(FIGURES, tmp_path / "figures") == []
    assert "figures needs the package matplotlib" in caplog.text and not (tmp_path / "figures").exists()


def test_a_figure_of_an_unknown_kind():
    with pytest.raises(ValueError, match="kind must be one of lines, points, bars, got 'pie'"):
        Figure("f", "", "", "", kind="pie")
