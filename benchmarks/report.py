"""Tables from a run: as text for a terminal of 80 columns, and as Markdown for the documentation."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .registry import TRAINING, matches
from .results import ABSENT, FAILED, WRONG, Measured, Row, Run

WIDTH = 80
_MARKED = re.compile(r"(<!-- bench:([^>]*?) -->\n).*?(<!-- /bench -->)", re.S)
_EXPLANATION = (
    "floor: the least arithmetic at the machine's peak or the least bytes at its copy bandwidth, the larger, both "
    "measured around the case; xfloor: time over floor; peak: share of the arithmetic peak; ±: interquartile range; "
    "gain: best other over fused; memory: growth at the peak of a call, fused/reference; saved: kept for the backward, "
    "fused/reference"
)

_GPU_EXPLANATION = (
    "first column: ours by the backend that auto takes; graph: the same calls as a CUDA graph; variant: the best of "
    "our other backends, as calls or graph; gain: calls over calls/graph over graph"
)


@dataclass
class Table:
    """Cells as text; the first column is aligned left, the others right."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

        def line(cells: list[str]) -> str:
            first, *rest = (
                f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            return " ".join([first, *rest]).rstrip()

        return "\n".join([self.title, line(self.header), *(line(row) for row in self.rows)])

    def markdown(self) -> str:
        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        rule = line(["---", *["---:"] * (len(self.header) - 1)])
        return "\n".join([f"**{self.title}**", "", line(self.header), rule, *(line(row) for row in self.rows)])


def seconds(value: float) -> str:
    """Three digits and a unit: ``"12.3ms"``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        # Half a unit of the third digit, so that 999.6 us is 1.00 ms and not 1000 us.
        if value >= scale * 0.9995:
            return _three(value / scale) + unit
    return _three(value / 1e-9) + "ns"


def size(value: int | None) -> str:
    """Two or three digits and a unit: ``"24M"``."""
    if value is None:
        return "-"
    for unit, scale in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= 0.9995 * scale:
            return (f"{value / scale:.1f}" if value < 9.95 * scale else f"{value / scale:.0f}") + unit
    return str(value)


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


# Which of the others have a column of their own where there is room for it.
_NAMED = ("eager", "compiled")


def tables(rows: list[Row], wide: bool = False) -> list[Table]:
    """One table for each operation, dtype, mode and section: ours, its floor, the best of the others, and memory.

    With ``wide`` also how many times as long the definition takes, eagerly and compiled.
    """
    return [_summary(group, wide) for group in _groups(rows)]


def _groups(rows: list[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.dtype, row.mode, row.section), []).append(row)
    return list(groups.values())


def _title(rows: list[Row]) -> str:
    first = rows[0]
    same = [f"{k}={v}" for k, v in first.shape.items() if len(rows) > 1 and all(row.shape[k] == v for row in rows)]
    named = [first.section] if first.section else []
    return "  ".join([first.op, *named, first.dtype, first.mode, *([" ".join(same)] if same else [])])


def _summary(rows: list[Row], wide: bool) -> Table:
    if rows[0].device == "cuda":
        return _gpu_summary(rows)
    training = rows[0].mode == TRAINING
    named = [name for name in _NAMED if wide and any(c.name == name for row in rows for c in row.timed())]
    header = ["case", "fused", "±", "xfloor", "peak", "best other", "gain", *named, "memory"]
    header += ["saved"] if training else []
    cells = []
    for row in rows:
        ours, other, reference, gain = row.fused(), row.best_other(), row.reference(), row.gain()
        line = [row.short_label, *(_own(row, ours) if ours else [_fused_status(row), "-", "-", "-"])]
        line += [f"{seconds(other.median)} {other.name}" if other else "-", _three(gain) + "x" if gain else "-"]
        for name in named:
            ratio = next((c.median / ours.median for c in row.timed() if ours and c.name == name), None)
            line.append(_three(ratio) + "x" if ratio else "-")
        line.append(_pair("peak_bytes", ours, reference))
        if training:
            line.append(_pair("saved_bytes", ours, reference))
        cells.append(line)
    return Table(_title(rows), header, cells)


def _gpu_summary(rows: list[Row]) -> Table:
    """Ours by the backend that auto takes, as calls and as a graph; our other backends; the best of the others."""
    names = {ours.name for row in rows if (ours := row.fused())}
    ours_is = names.pop() if len(names) == 1 else "ours"
    header = ["case", ours_is, "±", "graph", "xfloor", "variant", "best other", "gain", "memory"]
    cells = []
    for row in rows:
        ours, other = row.fused(), row.best_other()
        line = [row.short_label, seconds(ours.median) if ours else _fused_status(row)]
        line += [f"{ours.spread:.0%}", _time(ours.graph_median), _three(row.over_floor(ours))] if ours else ["-"] * 3
        variants = [c.best for c in row.timed() if c.role == "variant" and c.name != "recompute"]
        line.append(_time(min(variants, default=None)))
        line.append(f"{seconds(other.median)} {other.name}" if other else "-")
        gains = [_three(g) if g else "-" for g in (row.gain(), row.graph_gain())]
        line.append("/".join(gains) + "x" if row.gain() else "-")
        cells.append([*line, _pair("peak_bytes", ours, row.reference())])
    return Table(_title(rows), header, cells)


def _time(value: float | None) -> str:
    return "-" if value is None else seconds(value)


def _own(row: Row, c: Measured) -> list[str]:
    return [seconds(c.median), f"{c.spread:.0%}", _three(row.over_floor(c)), f"{row.of_peak(c):.0%}"]


def _fused_status(row: Row) -> str:
    """Why the fused op has no time: ``"absent"``, ``"wrong"`` or ``"failed"``."""
    return next((c.status for c in row.contenders if c.role == "fused"), ABSENT)


def _pair(field: str, ours: Measured | None, reference: Measured | None) -> str:
    return "/".join(size(getattr(c, field)) if c else "-" for c in (ours, reference))


def details(rows: list[Row]) -> list[Table]:
    """One table for each case with every contender, those without a time too."""
    found = []
    for row in rows:
        ours = row.fused()
        cells = []
        for c in row.contenders:
            if not c.samples:
                cells.append([c.name, c.status, *["-"] * (8 if row.device == "cuda" else 7)])
                continue
            ratio = _three(c.median / ours.median) + "x" if ours else "-"
            error = f"{c.error:.0e}" if c.error is not None else "-"
            graph = [_time(c.graph_median)] if row.device == "cuda" else []
            cells.append([c.name, *_own(row, c), *graph, ratio, size(c.peak_bytes), size(c.saved_bytes), error])
        header = ["", "time", "±", "xfloor", "peak", "vs fused", "memory", "saved", "error"]
        if row.device == "cuda":
            header.insert(5, "graph")
        sizes = " ".join(f"{k}={v}" for k, v in row.shape.items())
        floor = f"{row.op} {row.label}  {row.dtype} {row.mode}  {sizes}\n  floor {seconds(row.floor_seconds)}"
        found.append(Table(floor, header, cells))
    return found


def heading(run: Run) -> str:
    """The machine, the versions and the ceilings."""
    cpu, gpu = run.machine, run.machine.get("gpu")
    sets = " ".join(cpu["instruction_sets"])
    lines = [f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads ({sets})"]
    if gpu:
        lines.append(f"{gpu['name']}, CUDA {gpu['cuda']}, driver {gpu.get('driver') or 'unknown'}")
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    lines.append(f"{versions}, commit {(run.commit or 'unknown')[:12]}, {run.date}")
    values: dict[str, list[float]] = {}
    for sample in run.ceilings["samples"]:
        values.setdefault(sample["kind"], []).append(sample["value"])
    for kind, rates in values.items():
        unit = "GB/s" if kind == "copy" else "GFLOP/s"
        low, middle, high = (f"{f(rates) / 1e9:.0f}" for f in (min, statistics.median, max))
        lines.append(f"ceiling {kind}: {middle} {unit} ({low} to {high}), {run.ceilings['sources'][kind]}")
    return "\n".join(lines)


def notes(run: Run) -> str:
    """Who the contenders are, who was absent and why, and what went wrong; never left out of a report."""
    lines = [f"{name}: {about}" for name, about in _legend(run.rows).items()]
    for status in (ABSENT, WRONG, FAILED):
        for (name, reason), labels in _reasons(run, status).items():
            which = (
                f"{len(labels)} of {len(run.rows)} cases" if len(labels) > 3 or status == ABSENT else ", ".join(labels)
            )
            lines.append(f"{status if status == ABSENT else status.upper()}: {name} in {which}: {reason}")
    for (name, reason), count in _without_graph(run).items():
        lines.append(f"no graph: {name} in {count} of {len(run.rows)} cases: {reason}")
    if left_out := run.settings.get("left_out"):
        lines.append(f"not reached: {', '.join(left_out)}")
    if any(row.device == "cuda" for row in run.rows):
        lines.append(_GPU_EXPLANATION)
    lines += [_EXPLANATION, f"memory is measured as {run.memory_method or 'nothing: no contender ran'}"]
    return "\n".join(lines)


def _legend(rows: list[Row]) -> dict[str, str]:
    return {c.name: c.about for row in rows for c in row.contenders}


def _reasons(run: Run, status: str) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for row in run.rows:
        for c in row.contenders:
            if c.status == status:
                found.setdefault((c.name, c.reason), []).append(f"{row.op} {row.label} {row.dtype} {row.mode}")
    return found


def _without_graph(run: Run) -> dict[tuple[str, str], int]:
    """How often each contender could not be a CUDA graph, and why."""
    return dict(Counter((c.name, c.graph_reason) for row in run.rows for c in row.timed() if c.graph_reason))


def text(run: Run, every: bool = False) -> str:
    """The report for a terminal; with ``every``, each contender of each case."""
    shown = details(run.rows) if every else tables(run.rows)
    return "\n\n".join([_wrap(heading(run)), *(table.text() for table in shown), _wrap(notes(run))])


def _wrap(lines: str) -> str:
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines.splitlines())


def markdown(run: Run, match: str = "") -> str:
    """The tables whose operation, dtype and mode hold every word of ``match``, with machine and ceilings above."""
    chosen = [row for row in run.rows if matches(match, row.op, row.label, row.dtype, row.mode)]
    if not chosen:
        return ""
    part = Run(**{**vars(run), "rows": chosen})
    blocks = [heading(part).replace("\n", "  \n"), *(t.markdown() for t in tables(chosen, wide=True))]
    return "\n\n".join([*blocks, "\n".join(f"- {line}" for line in notes(part).splitlines())])


def write_into(run: Run, path: str | Path) -> int:
    """Fills the marked places of a Markdown file: ``<!-- bench:WORDS -->`` to ``<!-- /bench -->``.

    Returns:
        int: how many places were filled. A place that this run has nothing for is left as it is.

    Raises:
        ValueError: the file has no such place.
    """
    if not _MARKED.search(Path(path).read_text()):
        raise ValueError(f"{path} has no place for a table: <!-- bench:read_recurrence float32 --> to <!-- /bench -->")
    return fill_marked(path, _MARKED, lambda found: markdown(run, found[2]))


def fill_marked(path: str | Path, marked: re.Pattern[str], content: Callable[[re.Match[str]], str]) -> int:
    """Puts ``content`` between the first and the last group of each match of ``marked`` in a file.

    Returns:
        int: how many places were filled; one without content is left as it is.
    """
    path, filled = Path(path), 0

    def fill(found: re.Match[str]) -> str:
        nonlocal filled
        text = content(found)
        filled += bool(text)
        return f"{found[1]}{text}\n{found[marked.groups]}" if text else found[0]

    path.write_text(marked.sub(fill, path.read_text()))
    return filled
