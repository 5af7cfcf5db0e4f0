"""loss.png has a chart for each kind of value that was measured, and a title."""

import pytest
from support.inside import loss_figure

STEPS = [{"step": step, "loss": 3 - step / 9, "learning_rate": 1e-4} for step in range(1, 10)]


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
def test_what_was_measured_is_drawn(lines, labels, tmp_path):
    figure = loss_figure(lines, "my-run (llama)")
    assert [chart.get_ylabel() for chart in figure.axes] == labels and figure.get_suptitle() == "my-run (llama)"
    assert figure.axes[-1].get_xlabel() == "step"
    assert [line.get_label() for line in figure.axes[0].lines] == ["loss", "eval_loss"][: len(labels) // 2]
    figure.savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
