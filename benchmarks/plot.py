"""A picture of a run: every contender's time over the floor, and our gain over the best of the others."""

from __future__ import annotations

from pathlib import Path

from .report import _groups
from .results import Row, Run

_OURS = "#c1272d"
_OTHERS = ("#1f4e79", "#4c9a8f", "#e0a030", "#7a5195", "#8c8c8c", "#5a7d2a", "#b07aa1", "#9c6b4e")


def save(run: Run, path: str | Path) -> None:
    """Writes the picture; the format follows the file's ending.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no contender of the run has a time.
    """
    from matplotlib.figure import Figure

    blocks = [block for block in _groups(run.rows) if any(row.timed() for row in block)]
    if not blocks:
        raise ValueError("the run has no times to plot")
    columns = max(len(_by_group(block)) for block in blocks) + 1
    figure = Figure(figsize=(3.6 * columns, 2.9 * len(blocks) + 0.7), layout="constrained")
    axes = figure.subplots(len(blocks), columns, squeeze=False)
    colors = _colors(run.rows)
    for block, line in zip(blocks, axes, strict=True):
        groups = _by_group(block)
        for ax in line[len(groups) : -1]:
            ax.set_axis_off()
        for (name, rows), ax in zip(groups.items(), line[: len(groups)], strict=True):
            _over_floor(ax, rows, colors)
            first = rows[0]
            ax.set_title(f"{name or first.op}, {first.dtype}, {first.mode}", fontsize=9)
        line[0].set_ylabel("time over floor")
        _gain(line[-1], groups)
    figure.suptitle(f"{_machine(run)}, torch {run.versions['torch']}", fontsize=10)
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    ordered = [name for name in colors if name in handles]
    figure.legend(
        [handles[n] for n in ordered],
        ordered,
        loc="outside lower center",
        ncols=min(len(ordered), 3 * columns),
        fontsize=9,
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _machine(run: Run) -> str:
    gpu = run.machine.get("gpu")
    return gpu["name"] if gpu else f"{run.machine['model']}, {run.machine['threads']} threads"


def _by_group(rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def _colors(rows: list[Row]) -> dict[str, str]:
    roles = {c.name: c.role for row in rows for c in row.contenders}
    others = [name for name, role in roles.items() if role != "fused"]
    colors = {name: _OURS for name, role in roles.items() if role == "fused"}
    return colors | {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}


def _over_floor(ax, rows: list[Row], colors: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for name, color in colors.items():
        points = [(i, row.over_floor(c)) for i, row in enumerate(rows) for c in row.timed() if c.name == name]
        if points:
            ours = color == _OURS
            style = {"lw": 2.4, "ms": 5, "zorder": 3} if ours else {"lw": 1.2, "ms": 3.5, "zorder": 2}
            ax.plot(*zip(*points, strict=True), "o-", color=color, label=name, **style)
    ax.axhline(1, color="black", lw=0.8, ls=":")
    ax.set_yscale("log")
    # Plain numbers, as many as there is room for: an axis may span a factor of five or of a thousand.
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _ticks(ax, rows)


def _gain(ax, groups: dict[str, list[Row]]) -> None:
    any_gain = False
    for (name, rows), marker in zip(groups.items(), "os^Dv*XP" * len(groups), strict=False):
        points = [(i, row.gain()) for i, row in enumerate(rows) if row.gain() is not None]
        if points:
            any_gain = True
            ax.plot(*zip(*points, strict=True), marker + "-", color=_OURS, lw=1.2, ms=5, alpha=0.8)
            ax.annotate(name, points[-1], xytext=(5, 0), textcoords="offset points", fontsize=8, va="center")
    ax.axhline(1, color="black", lw=0.8, ls=":")
    ax.set_ylim(bottom=0)
    ax.set_title("times faster than the best other", fontsize=9)
    _ticks(ax, max(groups.values(), key=len))
    if not any_gain:
        ax.text(0.5, 0.5, "fused did not run", transform=ax.transAxes, ha="center", va="center", fontsize=9)


def _ticks(ax, rows: list[Row]) -> None:
    long = max(len(row.point) for row in rows) > 6
    ax.set_xticks(range(len(rows)), [row.point for row in rows], fontsize=8, rotation=20 if long else 0)
    ax.set_xlim(-0.4, len(rows) - 0.4)
    ax.set_xlabel(rows[0].axis, fontsize=8)
    ax.grid(axis="y", which="both", lw=0.3, alpha=0.6)
