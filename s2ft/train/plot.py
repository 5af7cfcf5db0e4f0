"""Draw log.jsonl as a picture."""

from pathlib import Path

from s2ft.train.output import read_log

CHARTS = {  # below each other, as far as they were measured
    "loss": ("loss", "eval_loss"),
    "learning rate": ("learning_rate",),
    "accuracy": ("eval_accuracy",),
    "nats": ("forgetting", "base_kl"),
}


def plot_loss(log: Path, image: Path, title: str = "") -> None:
    """Write a PNG file with the loss, the learning rate and the evaluations of a run.

    Args:
        log: The log.jsonl of the run.
        image: The file to write.
        title: Text above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = loss_figure(read_log(log), title)
    FigureCanvasAgg(figure)
    figure.savefig(image, dpi=120)


def loss_figure(lines: list[dict], title: str = ""):
    """Draw the lines of a log as a matplotlib Figure.

    Args:
        lines: The lines, as :func:`s2ft.train.output.read_log` returns them.
        title: Text above the picture.
    """
    from matplotlib.figure import Figure

    series = {key: [(line["step"], line[key]) for line in lines if key in line] for key in sum(CHARTS.values(), ())}
    drawn = [name for name, keys in CHARTS.items() if any(series[key] for key in keys)] or ["loss"]
    figure = Figure(figsize=(8, 2 + 2 * len(drawn)), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    charts = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for name, chart in zip(drawn, charts):
        for key in CHARTS[name]:
            if series[key]:
                chart.plot(*zip(*series[key]), marker="." if len(series[key]) <= 30 else None, label=key)
                chart.legend(frameon=False)
        chart.set_ylabel(name)
        chart.grid(alpha=0.3)
    charts[-1].set_xlabel("step")
    return figure
