"""A picture of log.jsonl."""

from pathlib import Path

from s2ft.train.output import read_log


def plot_loss(log: Path, image: Path, window: int = 10) -> None:
    """Loss over steps, its running mean over `window` lines, the learning rate, and loss and accuracy of evaluations
    where there are any, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_log(log)
    steps, losses = _series(lines, "loss")
    means = [sum(losses[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(losses))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, label="loss")
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window}")
    axes.plot(*_series(lines, "eval_loss"), color="tab:orange", marker="o", label="evaluation loss")
    rate = axes.twinx()
    rate.set_ylabel("learning rate")
    rate.plot(*_series(lines, "learning_rate"), color="tab:gray", linestyle=":", label="learning rate")
    shown = [line for line in axes.lines + rate.lines if len(line.get_xdata())]
    if any("eval_accuracy" in line for line in lines):
        accuracy = axes.twinx()
        accuracy.set_axis_off()
        accuracy.set_ylim(0, 1)
        points = _series(lines, "eval_accuracy")
        shown += accuracy.plot(*points, color="tab:green", marker="s", label=f"accuracy, last {points[1][-1]:.1%}")
    axes.legend(handles=shown, loc="upper right")
    axes.set_ylim(bottom=0)
    figure.savefig(image, dpi=120)


def _series(lines: list[dict], key: str) -> tuple[list, list]:
    found = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in found], [value for _, value in found]
