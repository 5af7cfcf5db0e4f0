"""A picture of log.jsonl."""
from pathlib import Path

from s2ft.train.output import read_log


def plot_loss(log: Path, image: Path, window: int = 10) -> None:
    """Loss over steps, its running mean over `window` lines, and the learning rate, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_log(log)
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    means = [sum(losses[max(0, i - window + 1):i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(losses))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, label="loss")
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window}")
    rate = axes.twinx()
    rate.set_ylabel("learning rate")
    rate.plot(steps, [line["learning_rate"] for line in lines], color="tab:gray", linestyle=":", label="learning rate")
    axes.legend(handles=axes.lines + rate.lines, loc="upper right")
    axes.set_ylim(bottom=0)
    figure.savefig(image, dpi=120)
