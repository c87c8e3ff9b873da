"""The picture of a result: accuracy against density, and time against density beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import binomial, medians, order, points, share, title

# Okabe and Ito's palette, which stays apart under every kind of colour blindness: a colour for a kind of ticket.
COLOURS = {
    "imp": "#CC79A7", "imp global": "#E69F00", "imp scaled": "#D55E00", "project": "#0072B2",
    "oneshot global": "#56B4E9", "oneshot": "#009E73", "random": "#7F7F7F", "dense": "#000000",
}  # fmt: skip
# By the side of a block.
LINES = {None: ("-", "*"), 8: (":", "v"), 16: ("--", "s"), 32: ("-", "o"), 64: ("-.", "D")}
CALLS = (("step", COLOURS["imp scaled"], "training step"), ("inference", COLOURS["project"], "inference"))


def save(found: dict, path: Path) -> None:
    """Writes the picture; the format follows the file's ending.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row["dtype"] for row in found["times"]))
    figure = Figure(figsize=(7.2 + 3.9 * len(dtypes), 5), layout="constrained")
    axes = figure.subplots(1, 1 + len(dtypes), squeeze=False, width_ratios=[1.8, *(1 for _ in dtypes)])[0]
    draw_accuracy(axes[0], found)
    for ax, dtype in zip(axes[1:], dtypes, strict=True):
        draw_times(ax, found, dtype)
    corpus, settings = found["corpus"], found["settings"]
    figure.suptitle(
        f"{found['model']} on {corpus['name']} ({corpus['classes']} classes), {settings['steps']} steps of "
        f"{settings['batch']} texts",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_accuracy(ax, found: dict) -> None:
    """A line a method; the dense model with its error as a band."""
    table = points(found)
    dense = table.pop("dense")[1.0]
    p, error = 100 * share(dense), 100 * binomial(share(dense), dense[0]["texts"])
    ax.axhspan(p - error, p + error, color=COLOURS["dense"], alpha=0.10, lw=0)
    ax.axhline(p, color=COLOURS["dense"], lw=1.2, label=f"dense ± binomial error ({dense[0]['texts']} texts)")
    for method, rows in table.items():
        side, densities = block(method), sorted(rows)
        dashes, mark = LINES.get(side, ("-", "."))
        style: dict[str, Any] = {"color": colour(method), "ls": dashes, "marker": mark, "ms": 5 if side else 8}
        ax.plot(densities, [100 * share(rows[d]) for d in densities], label=title(method), lw=1.6, **style)
    ax.axhline(100 * found["corpus"]["majority"], color="#BBBBBB", ls=":", lw=1.5, label="most frequent label")
    ax.set_title(f"Test accuracy, trained in {found['settings']['dtype']}", fontsize=10)
    ax.set(ylabel="%", ylim=(0, None))
    finish(ax, "lower left")


def draw_times(ax, found: dict, dtype: str) -> None:
    """Time over the dense model's: a colour a call, a dash a block."""
    rows = [row for row in found["times"] if row["dtype"] == dtype]
    for method in sorted({row["method"] for row in rows}, key=order):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["density"])
        dashes, mark = LINES.get(block(method), ("-", "."))
        for call, shade, words in CALLS:
            shares = [ticket / dense for dense, ticket in (medians(row, call) for row in mine)]
            style: dict[str, Any] = {"color": shade, "ls": dashes, "marker": mark, "ms": 5, "lw": 1.5}
            ax.plot([row["density"] for row in mine], shares, label=f"{words}, blocks of {block(method)}", **style)
    ax.axhline(1, color=COLOURS["dense"], lw=1, ls=":")
    threads = rows[0]["threads"]
    told = ",\nother programs running" if found["timed"]["shared"] else ""
    ax.set_title(f"Time over dense, {dtype}, {threads} thread{'s' * (threads != 1)}{told}", fontsize=10)
    ax.set(ylim=(0, None))
    finish(ax, "upper right")


def finish(ax, legend: str) -> None:
    ax.set(xlabel="density of the pruned layers", xlim=(1, 0))
    ax.legend(fontsize=8, loc=legend)
    ax.grid(alpha=0.25)


def block(method: str) -> int | None:
    """The side of a method's blocks; None for single weights."""
    rest = method.split("-")[1:]
    return int(rest[0]) if rest else None


def colour(method: str) -> str:
    """By kind, and of IMP by scope."""
    kind, *rest = method.split("-")
    scope = f"{kind} {rest[1] if rest[1:] else 'global'}" if rest else kind
    return COLOURS.get(scope, COLOURS[kind])
