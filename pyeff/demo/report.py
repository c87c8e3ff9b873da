"""What the demo shows: a table for the terminal, a picture, and everything as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyeff.demo.variants import TITLES

if TYPE_CHECKING:
    from rich.table import Table

# Okabe and Ito's palette, which stays apart under every kind of colour blindness.
COLOURS = {"full": "#0072B2", "reference": "#E69F00", "fused": "#D55E00", "head": "#7F7F7F"}
MARKS = {"full": "s", "reference": "o", "fused": "D", "head": "^"}
MIB = 2**20


def summary(results: dict) -> Table:
    """One row a variant, at most 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"After {results['steps']} steps", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("test", "step", "READ part", "peak", "saved", "trained"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, row in results["variants"].items():
        table.add_row(
            TITLES[key],
            f"{100 * row['accuracy']:.1f} %",
            f"{1000 * row['step_seconds']:.0f} ms",
            f"{1000 * row['read_seconds']:.0f} ms" if "read_seconds" in row else "",
            f"{row['peak_bytes'] / MIB:.0f} MiB",
            f"{row['saved_bytes'] / MIB:.0f} MiB",
            f"{row['trainable'] / 1e6:.2f} M",
        )
    return table


def write_json(results: dict, path: Path) -> None:
    """The results, indented."""
    path.write_text(json.dumps(results, indent=2) + "\n")


def picture(results: dict, path: Path) -> None:
    """Accuracy and loss against each variant's own training time, and bars for time, memory and saved bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["variants"]
    figure = pyplot.figure(figsize=(11, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(1.25, 1))
    accuracy, loss = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    for key, row in rows.items():
        line: dict[str, Any] = {"color": COLOURS[key], "label": TITLES[key], "linewidth": 2}
        seconds = [point[1] for point in row["accuracies"]]
        accuracy.plot(seconds, [100 * point[2] for point in row["accuracies"]], marker=MARKS[key], **line)
        times, total = [], 0.0
        for step in row["seconds"]:
            total += step
            times.append(total)
        loss.plot(times, smooth(row["losses"]), **line)
    majority = 100 * results["majority"]
    accuracy.axhline(majority, color="#BBBBBB", linestyle=":", linewidth=1.5, label="most frequent label")
    accuracy.set(title="Test accuracy", ylabel="%", ylim=(0, 100), xlabel="seconds of training")
    loss.set(title="Training loss (running mean)", xlabel="seconds of training", ylim=(0, None))
    accuracy.legend(loc="lower right", fontsize=9)
    for axes in (accuracy, loss):
        axes.set_xlim(0, None)
        axes.grid(alpha=0.25)
    bars(figure.add_subplot(grid[1, :2]), rows, "step_seconds", 1000, "Time of a step", "ms")
    bars(figure.add_subplot(grid[1, 2:4]), rows, "peak_bytes", 1 / MIB, "Peak memory over the loaded model", "MiB")
    bars(figure.add_subplot(grid[1, 4:]), rows, "saved_bytes", 1 / MIB, "Saved for the backward", "MiB")
    machine = results["machine"]
    threads, corpus = machine["cpu"]["threads"], results["corpus"]
    figure.suptitle(
        f"{results['model']} on {corpus['name']} ({len(corpus['labels'])} classes), "
        f"{results['steps']} steps of {results['settings']['batch']} texts\n"
        f"{machine['cpu']['model']}, {threads} thread{'s' * (threads != 1)}, torch {machine['versions']['torch']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def smooth(values: list[float], share: float = 0.9) -> list[float]:
    """Exponential running mean, without the pull towards zero at its start."""
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = share * total + (1 - share) * value, share * weight + (1 - share)
        out.append(total / weight)
    return out


def bars(axes, rows: dict, name: str, scale: float, title: str, unit: str) -> None:
    """One horizontal bar a variant, from zero, with its value written at its end."""
    shown = [(key, scale * row[name]) for key, row in rows.items() if name in row]
    positions = list(range(len(shown)))[::-1]
    drawn = axes.barh(positions, [value for _, value in shown], color=[COLOURS[key] for key, _ in shown], height=0.65)
    axes.bar_label(drawn, labels=[f"{value:.0f}" for _, value in shown], padding=3, fontsize=9)
    axes.set_yticks(positions, [TITLES[key] for key, _ in shown], fontsize=9)
    axes.set_title(f"{title} ({unit})", fontsize=10)
    axes.set_xlim(0, 1.18 * max([value for _, value in shown], default=1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
