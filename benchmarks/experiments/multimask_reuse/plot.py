"""The picture of a result: accuracy against time, a colour for each M."""

from __future__ import annotations

from pathlib import Path

from .report import curves, kinds

# Okabe and Ito's palette, which stays apart under every kind of colour blindness.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
LINES = {"fused": ("-", "o"), "eager": ("--", "x")}


def save(found: dict, path: Path) -> None:
    """Writes the picture; the format follows the file's ending.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    shown = kinds(found)
    figure = Figure(figsize=(1.5 + 5 * len(shown), 4.4), layout="constrained")
    for ax, kind in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        draw(ax, found, kind)
    figure.suptitle("Linear probe against pre-training time, equal numbers of students", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw(ax, found: dict, kind: str) -> None:
    """A line for each M and path, a mark for each probe."""
    table = curves(found, kind)
    every = list(dict.fromkeys(masks for masks, _ in table))
    for (masks, how), curve in table.items():
        dashes, mark = LINES[how]
        ax.plot(
            [seconds for seconds, _ in curve], [100 * share for _, share in curve], color=COLOURS[every.index(masks)],
            ls=dashes, marker=mark, ms=4, lw=1.5, label=f"M = {masks}, {how}",
        )  # fmt: skip
    s = found["settings"][kind]
    ax.set_title(f"{found['data'][kind]['name']}: {s['steps']} steps of {s['rows']} students", fontsize=10)
    ax.set(xlabel="seconds of pre-training", ylabel="% right")
    ax.legend(fontsize=7)
    ax.grid(alpha=0.25)
