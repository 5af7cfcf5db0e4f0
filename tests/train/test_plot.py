"""loss.png has a chart for each kind of value that was measured, and a title."""

import json

import pytest
from support.inside import loss_figure, plot_loss

STEPS = [{"step": step, "loss": 3 - step / 9, "learning_rate": 1e-4} for step in range(1, 10)]


@pytest.fixture(autouse=True)
def real_plots(monkeypatch):
    monkeypatch.setattr("s2ft.train.output.loss_figure", loss_figure)


@pytest.mark.parametrize(
    "lines, labels",
    [
        ([], ["loss"]),
        (STEPS, ["loss", "learning rate"]),
        (
            [*STEPS, {"step": 9, "eval_loss": 4.0, "eval_accuracy": 0.5, "forgetting": 0.1}],
            ["loss", "learning rate", "accuracy", "nats"],
        ),
    ],
)
def test_what_was_measured_is_drawn_into_a_file(lines, labels, tmp_path):
    figure = loss_figure(lines, "my-run (llama)")
    assert [chart.get_ylabel() for chart in figure.axes] == labels and figure.get_suptitle() == "my-run (llama)"
    assert figure.axes[-1].get_xlabel() == "step"
    assert [line.get_label() for line in figure.axes[0].lines] == ["loss", "eval_loss"][: len(labels) // 2]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").stat().st_size > 1000
