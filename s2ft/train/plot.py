"""Draw log.jsonl as a picture."""

from pathlib import Path

from s2ft.train.output import read_log

FEW = 30  # Up to this number of points each one gets a marker.


def plot_loss(log: Path, image: Path, title: str = "") -> None:
    """Write a PNG file with the loss, its running mean, the learning rate and the evaluations of a run.

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
    """Draw the lines of a log.

    Args:
        lines: The lines, as :func:`s2ft.train.output.read_log` returns them.
        title: Text above the picture.

    Returns:
        A matplotlib Figure: the loss with the learning rate behind it, and below it the accuracy and the distance from
        the base, if they were measured.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    more = [draw for key, draw in BELOW.items() if any(name in line for line in lines for name in key)]
    figure = Figure(figsize=(8, 4.5 + 1.5 * len(more)), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    rows = [3, *(1 for _ in more)]
    charts = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    handles = _draw_loss(charts[0], lines) + _draw_learning_rate(charts[0], lines)
    for chart, draw in zip(charts[1:], more):
        handles += draw(chart, lines)
        chart.grid(alpha=0.3)
    charts[-1].set_xlabel("step")
    charts[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_loss(chart, lines: list[dict]) -> list:
    """Draw the loss, its running mean and the evaluations. Returns the lines for the legend."""
    steps, losses = _series(lines, "loss")
    window = max(3, len(losses) // 10) | 1
    marker = "." if len(losses) <= FEW else None
    drawn = chart.plot(steps, losses, color="tab:blue", alpha=0.35, marker=marker, label="loss")
    if len(losses) > window:
        label = f"mean of {window} points, centred"
        drawn += chart.plot(steps, centred_mean(losses, window), color="tab:blue", label=label)
    points = _series(lines, "eval_loss")
    if points[0]:
        drawn += chart.plot(*points, color="tab:orange", marker="o", clip_on=False, label="evaluation loss")
    chart.set_ylabel("loss")
    chart.margins(x=0.02, y=0.08)
    chart.grid(alpha=0.3)
    return drawn


def _draw_learning_rate(chart, lines: list[dict]) -> list:
    """Draw the learning rate as a light area behind the loss, with an axis of its own."""
    rate = chart.twinx()
    points = _series(lines, "learning_rate")
    area = rate.fill_between(*points, color="0.92", label="learning rate")
    rate.set_ylabel("learning rate", color="0.55")
    rate.tick_params(colors="0.55")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.yaxis.get_offset_text().set_color("0.55")
    rate.set_ylim(bottom=0, top=1.25 * max(points[1], default=1) or 1)
    chart.set_zorder(rate.get_zorder() + 1)
    chart.patch.set_visible(False)  # The chart in front would hide the area.
    return [area]


def _draw_accuracy(chart, lines: list[dict]) -> list:
    """Draw the accuracies of the evaluations."""
    steps, values = _series(lines, "eval_accuracy")
    label = f"accuracy (last {values[-1]:.1%})"
    chart.set(ylabel="accuracy", ylim=(0, 1))
    chart.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return chart.plot(steps, values, color="tab:green", marker="s", clip_on=False, label=label)


def _draw_drift(chart, lines: list[dict]) -> list:
    """Draw how far the model has moved from its base."""
    drawn = []
    for key, name, color in (("forgetting", "forgetting", "tab:red"), ("base_kl", "KL from the base", "tab:purple")):
        steps, values = _series(lines, key)
        if steps:
            label = f"{name} (last {values[-1]:.3f})"
            drawn += chart.plot(steps, values, color=color, marker=".", clip_on=False, label=label)
    chart.set_ylabel("nats")
    return drawn


# Charts below that of the loss, by the values that they draw.
BELOW = {("eval_accuracy",): _draw_accuracy, ("forgetting", "base_kl"): _draw_drift}


def centred_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of the points around each point, which does not lag behind the values.

    Args:
        values: The values.
        window: Odd number of points. Near the start, where a loss falls steeply, as many points are used before the
            point as after it. At the end there are fewer points after it.

    Returns:
        One mean for each value.

    Example:
        >>> from s2ft.train.plot import centred_mean
        >>> centred_mean([1.0, 2.0, 3.0, 10.0], 3)
        [1.0, 2.0, 5.0, 6.5]
    """
    means = []
    for i in range(len(values)):
        reach = min(window // 2, i)
        near = values[i - reach : i + reach + 1]
        means.append(sum(near) / len(near))
    return means


def _series(lines: list[dict], key: str) -> tuple[list, list]:
    """Return steps and values of a key."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in found], [value for _, value in found]
