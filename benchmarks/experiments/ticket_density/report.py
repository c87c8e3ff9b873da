"""The picture and the tables of a result. Nothing in them is typed."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from .train import from_hex

MIB = 2**20
OPENING, CLOSING = "<!-- ticket-density:{name} -->", "<!-- /ticket-density -->"
MARKED = re.compile(r"^<!-- ticket-density:(\w+) -->\n(.*?)^<!-- /ticket-density -->$", re.M | re.S)
# Okabe and Ito's palette, which stays apart under every kind of colour blindness: a colour for a kind of ticket.
COLOURS = {"imp": "#D55E00", "project": "#0072B2", "oneshot": "#009E73", "random": "#7F7F7F", "dense": "#000000"}
WORDS = {"imp": "IMP", "project": "projection of IMP", "oneshot": "one shot", "random": "random"}
BLOCKS = {None: ("-", "*"), 8: (":", "v"), 16: ("--", "s"), 32: ("-", "o"), 64: ("-.", "D")}

Points = dict[str, dict[float, list[dict[str, Any]]]]


def title(method: str) -> str:
    """A method in words."""
    kind, *rest = method.split("-")
    if kind == "dense":
        return "dense"
    words = f"{WORDS[kind]}, {f'blocks of {rest[0]}' if rest else 'single weights'}"
    return f"{words}, {rest[1]}" if rest[1:] else words


def points(found: dict) -> Points:
    """The trainings by method and density, those of several seeds together."""
    table: Points = defaultdict(lambda: defaultdict(list))
    for row in found["trainings"]:
        table[row["method"]][row["density"]].append(row)
    return table


def share(rows: list[dict]) -> float:
    """The share of right answers over all seeds."""
    return sum(r["right"] for r in rows) / sum(r["texts"] for r in rows)


def binomial(p: float, texts: int) -> float:
    """The standard error of a share of ``texts`` answers. Seeds share the test set, so they do not make it smaller."""
    return math.sqrt(p * (1 - p) / texts)


def differs(rows: list[dict], dense: list[dict]) -> bool:
    """Whether the right answers are fewer than the dense model's by over two standard errors of paired differences.

    The pairs are the texts; of several seeds, those that both have, the mean over seeds is compared.
    """
    by_seed = {row["seed"]: row for row in dense}
    pairs = [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    if not pairs:
        return False
    bits = [[from_hex(r["answers"], r["texts"]) for r in pair] for pair in pairs]
    texts = pairs[0][0]["texts"]
    gaps = [statistics.mean(int(a[i]) - int(b[i]) for a, b in bits) for i in range(texts)]
    error = statistics.pstdev(gaps) / math.sqrt(texts)
    return statistics.mean(gaps) < -2 * error


def accuracy(found: dict) -> str:
    """Test accuracy as a Markdown table: a row a method, a column a density."""
    table, corpus, settings = points(found), found["corpus"], found["settings"]
    dense = table.pop("dense")[1.0]
    columns = sorted({d for rows in table.values() for d in rows}, reverse=True)
    p, texts = share(dense), dense[0]["texts"]
    seeds = sorted({row["seed"] for row in found["trainings"]})
    lines = [
        f"{found['model']} on {corpus['name']}, {corpus['classes']} classes: {corpus['train']} texts to learn from, "
        f"{settings['steps']} steps of {settings['batch']} in {settings['dtype']}, {count(seeds)}. "
        f"Right of {texts} texts, in %: dense {100 * p:.1f}, ± {100 * binomial(p, texts):.1f} (binomial); always the "
        f"most frequent label {100 * corpus['majority']:.1f}.",
        "",
        f"| density | {' | '.join(f'{d:g}' for d in columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    for method, rows in table.items():
        cells = []
        for d in columns:
            star = "*" if rows.get(d) and differs(rows[d], dense) else ""
            cells.append(f"{100 * share(rows[d]):.1f}{star}" if d in rows else "")
        lines.append(f"| {title(method)} | {' | '.join(cells)} |")
    note = "\\* fewer than dense by over two standard errors of the difference, text by text."
    return "\n".join([*lines, "", note])


def count(seeds: list[int]) -> str:
    return f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"


def medians(row: dict, call: str) -> tuple[float, float]:
    """(dense, ticket), in seconds."""
    return statistics.median(row[call]["dense"]), statistics.median(row[call]["ticket"])


def speed(found: dict) -> str:
    """Time and memory as a Markdown table: a row a ticket, dense / ticket in each cell."""
    settings, first, timed = found["settings"], found["times"][0], found["timed"]
    told = "other programs were running" if timed["shared"] else "nothing else was running"
    tokens = settings["max_length"]
    lines = [
        f"{timed['machine']['model']}, {first['threads']} thread{'s' * (first['threads'] != 1)}; {told}. Medians of "
        f"{len(first['step']['dense'])}, in turns; dense / ticket.",
        "",
        f"| ticket | density | dtype | step, {settings['batch']} x {tokens} tokens | inference | one text | state "
        "| peak |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found["times"]:
        cells = [
            f"{1000 * a:.{p}f} / {1000 * b:.{p}f} ms ({a / b:.2f}x)"
            for call, p in CALLS
            for a, b in [medians(row, call)]
        ]
        for name in ("bytes", "peak_bytes"):
            a, b = (row[name][k] if name == "peak_bytes" else row[name][k]["pruned"] for k in ("dense", "ticket"))
            cells.append(f"{a / MIB:.0f} / {b / MIB:.0f} MiB")
        lines.append(f"| {title(row['method'])} | {row['density']:g} | {row['dtype']} | {' | '.join(cells)} |")
    note = (
        "state: weights with their index, gradients and Adam's moments of the pruned layers. peak: of a training step, "
        "the whole model counted, in a process of its own."
    )
    return "\n".join([*lines, "", note])


CALLS = (("step", 0), ("inference", 0), ("one_text", 1))
TABLES = {"accuracy": accuracy, "speed": speed}


def write_into(found: dict, page: Path) -> int:
    """Fills the places of a Markdown file that ask for a table of the result; returns how many there are.

    Raises:
        ValueError: a place asks for something else.
    """

    def fill(match: re.Match) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"{page} asks for {match[1]!r}, expected one of {', '.join(TABLES)}")
        return f"{OPENING.format(name=match[1])}\n\n{TABLES[match[1]](found)}\n\n{CLOSING}"

    text, places = MARKED.subn(fill, page.read_text())
    page.write_text(text)
    return places


def picture(found: dict, path: Path) -> None:
    """Accuracy against density by method, and, where there are times, those of step and inference against density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = bool(found["times"])
    figure = pyplot.figure(figsize=(13 if timed else 7.5, 5), layout="constrained")
    grid = figure.add_gridspec(1, 5 if timed else 3)
    draw_accuracy(figure.add_subplot(grid[0, :3]), found)
    if timed:
        draw_times(figure.add_subplot(grid[0, 3:]), found)
    settings = found["settings"]
    figure.suptitle(
        f"{found['model']} on {found['corpus']['name']}: {settings['steps']} steps of {settings['batch']} texts in "
        f"{settings['dtype']}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_accuracy(axes, found: dict) -> None:
    table = points(found)
    dense = table.pop("dense")[1.0]
    p = 100 * share(dense)
    error = 100 * binomial(share(dense), dense[0]["texts"])
    axes.axhspan(p - error, p + error, color="#000000", alpha=0.10, lw=0)
    axes.axhline(p, color=COLOURS["dense"], lw=1.2, label=f"dense ± binomial error ({dense[0]['texts']} texts)")
    for method, rows in table.items():
        kind, *rest = method.split("-")
        side = int(rest[0]) if rest else None
        dashes, mark = BLOCKS.get(side, ("-", "."))
        ordered = sorted(rows)
        style: dict[str, Any] = {"color": COLOURS[kind], "ls": dashes, "marker": mark, "ms": 6 if side else 9}
        axes.plot(ordered, [100 * share(rows[d]) for d in ordered], label=title(method), lw=1.6, **style)
    axes.axhline(100 * found["corpus"]["majority"], color="#BBBBBB", ls=":", lw=1.5, label="most frequent label")
    axes.set(title="Test accuracy", ylabel="%", xlabel="density of the pruned layers", xlim=(1, 0), ylim=(0, None))
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(alpha=0.25)


def draw_times(axes, found: dict) -> None:
    """Time over the dense model's, by block."""
    rows = found["times"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    for method in dict.fromkeys(row["method"] for row in rows):
        side = int(method.split("-")[1])
        for dtype in dtypes[:1]:
            mine = sorted((r for r in rows if (r["method"], r["dtype"]) == (method, dtype)), key=lambda r: r["density"])
            for call, colour, words in (("step", "#D55E00", "training step"), ("inference", "#0072B2", "inference")):
                shares = [b / a for a, b in (medians(row, call) for row in mine)]
                dashes, mark = BLOCKS.get(side, ("-", "."))
                axes.plot([r["density"] for r in mine], shares, color=colour, ls=dashes, marker=mark, ms=5, lw=1.5,
                          label=f"{words}, blocks of {side}")  # fmt: skip
    axes.axhline(1, color="black", lw=1, ls=":")
    told = ", machine shared" if found["timed"]["shared"] else ""
    axes.set(title=f"Time over the dense model's ({dtypes[0]}, {rows[0]['threads']} threads{told})",
             xlabel="density of the pruned layers", xlim=(1, 0), ylim=(0, None))  # fmt: skip
    axes.title.set_fontsize(10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
