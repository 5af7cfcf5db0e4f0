"""loss.png has a title, whole steps, a mean without lag and the learning rate behind the loss. Nothing is cut off."""

import json

import pytest

pytest.importorskip("matplotlib")

from s2ft.train.output import RunFolder
from s2ft.train.plot import centred_mean, loss_figure, plot_loss


@pytest.fixture(autouse=True)
def real_plots(monkeypatch):
    monkeypatch.setattr("s2ft.train.plot.loss_figure", loss_figure)


def log(steps, evaluated=(), accuracy=False):
    lines = [{"step": step, "loss": 3 - step / steps, "learning_rate": 1e-4 * step} for step in range(1, steps + 1)]
    for step in evaluated:
        lines.append({"step": step, "eval_loss": 4.0, **({"eval_accuracy": 0.5} if accuracy else {})})
    return lines


def drawn(figure):
    figure.canvas.draw()
    return {chart.get_ylabel(): chart for chart in figure.axes}


@pytest.mark.parametrize("steps", [1, 3, 12, 300])
def test_axes_have_labels_and_steps_are_whole(steps):
    figure = loss_figure(log(steps), "my-run (llama)")
    charts = drawn(figure)
    assert set(charts) == {"loss", "learning rate"} and charts["loss"].get_xlabel() == "step"
    assert all(tick == round(tick) for tick in charts["loss"].get_xticks())
    assert figure.get_suptitle() == "my-run (llama)"


def test_the_learning_rate_is_behind_the_loss_and_has_its_own_axis():
    charts = drawn(loss_figure(log(20)))
    assert charts["learning rate"].get_zorder() < charts["loss"].get_zorder()
    assert not charts["loss"].patch.get_visible() and charts["learning rate"].get_ylim()[1] > 20e-4


def test_evaluations_are_inside_the_chart_and_the_legend_outside():
    figure = loss_figure(log(20, evaluated=(10, 20), accuracy=True))
    charts = drawn(figure)
    chart = charts["loss"]
    (points,) = [line for line in chart.lines if line.get_label() == "evaluation loss"]
    low, high = chart.get_ylim()
    assert all(low < value < high for value in points.get_ydata()) and not points.get_clip_on()
    assert charts["accuracy"].get_ylim() == (0, 1) and charts["accuracy"].get_xlabel() == "step"
    (legend,) = figure.legends
    place = legend.get_window_extent()
    assert not any(place.overlaps(chart.get_window_extent()) for chart in figure.axes)
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["loss", "mean of 3 points, centred", "evaluation loss", "learning rate", "accuracy (last 50.0%)"]


def test_the_mean_does_not_lag():
    """The mean of a falling line is the line itself, except near its end, where fewer points follow."""
    values = [100.0 - i for i in range(50)]
    found = centred_mean(values, 11)
    assert found[:45] == pytest.approx(values[:45]) and found[-1] == pytest.approx(sum(values[-6:]) / 6)
    assert centred_mean([], 3) == [] and centred_mean([2.0], 3) == [2.0]


def test_the_title_names_run_model_and_ratios(tmp_path):
    folder = RunFolder(tmp_path / "run-7")
    assert folder.title() == "run-7"
    folder.begin({"model": "org/Model-1B", "adapter.d_ratio": 0.03, "adapter.o_ratio": 0.0, "training.epochs": 3})
    assert folder.title() == "run-7 (Model-1B, d_ratio 0.03)"
    folder.begin({"demo": True, "model": None, "d_ratio": 0.03, "o_ratio": 0.12})
    assert folder.title() == "run-7 (d_ratio 0.03, o_ratio 0.12)"


def test_a_log_is_drawn_into_a_file(tmp_path):
    for name, lines in (("some", log(4)), ("none", [])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        plot_loss(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.png", "a run")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
